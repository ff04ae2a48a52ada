"""Cut and allocate channel-major planes; their rows begin at aligned addresses."""

from __future__ import annotations

import torch
from torch import Tensor


def padded_planes(
    x: Tensor, channels: int, dtype: torch.dtype, device: torch.device | None = None
) -> Tensor:
    """Allocate the planes of a tile with rows padded in memory, so that kernels load wide.

    Args:
        x: tile [B, I, J, C].
        channels: of the planes.
        dtype: of the planes.
        device: of the planes, None for that of the tile.

    Returns:
        [B, channels, I, J]; the row stride is a multiple of 16.
    """
    b, i, j = x.shape[:3]
    return x.new_empty((b, channels, i, -(-j // 16) * 16), dtype=dtype, device=device)[..., :j]


def of_both_halves(m: Tensor, channels: tuple[int, int] | None) -> Tensor:
    """Cut the same channels out of both halves of a weight.

    Args:
        m: [2D, C].
        channels: (start, stop) of D, None for all.

    Returns:
        [2d, C]; `m` itself where that is all of it.
    """
    if channels is None:
        return m
    half, (lo, hi) = m.shape[0] // 2, channels
    return m if hi - lo == half else torch.cat((m[lo:hi], m[half + lo : half + hi]))
