"""Evaluate Boltz's steering potentials on compact features."""
