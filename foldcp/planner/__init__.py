"""Predict what each strategy costs, and choose one alike on all ranks."""
