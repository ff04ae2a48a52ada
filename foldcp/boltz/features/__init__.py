"""Compute compact features: indices and sparse lists in place of N x N tensors."""
