"""Allocate the planes that kernels write, with rows that begin at aligned addresses."""

from __future__ import annotations

import torch
from torch import Tensor


def padded_planes(x: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Allocate the planes of a tile with rows padded in memory, so that kernels load wide.

    Args:
        x: tile [B, I, J, C].
        channels: of the planes.
        dtype: of the planes.

    Returns:
        [B, channels, I, J]; the row stride is a multiple of 16.
    """
    b, i, j = x.shape[:3]
    return x.new_empty((b, channels, i, -(-j // 16) * 16), dtype=dtype)[..., :j]
