"""Boltz-1's modules on tiles, where they differ from Boltz-2's; the rings and ops are the same."""
