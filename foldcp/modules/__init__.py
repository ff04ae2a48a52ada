"""Boltz-shaped modules on tiles; each wraps its Boltz twin and shares its parameters."""
