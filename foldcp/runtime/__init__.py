"""Keep the ranks of one run together, from their start to their end, without importing Boltz."""
