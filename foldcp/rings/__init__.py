"""Distributed ops, one file each: start the next step's transfer, compute, wait, swap."""
