"""Define the outer product mean in plain torch: the truth, run it in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def outer_product_mean(
    z: Tensor, a: Tensor, b: Tensor, mask: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """Compute z + outer product mean.

    Args:
        z: pair tensor [B, N, N, C].
        a: [B, S, N, D].
        b: [B, S, N, D].
        mask: [B, S, N], 1 = keep.
        weight: [C, D * D].
        bias: [C].

    Source: AlphaFold 3, Algorithm 9.
    """
    count = torch.einsum("bsi,bsj->bij", mask, mask).clamp(min=1)
    o = torch.einsum("bsic,bsjd->bijcd", a, b).flatten(-2) / count[..., None]
    return z + F.linear(o, weight, bias)


def outer_product_mean_tile(
    z: Tensor, a: Tensor, b: Tensor, count: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """Compute `outer_product_mean` of a tile.

    Args:
        z: pair tile [B, R, T, C].
        a: masked [B, S, R, D].
        b: [B, S, T, D].
        count: n_ij [B, R, T].
        weight: [C, D * D].
        bias: [C].
    """
    o = torch.einsum("bsic,bsjd->bijcd", a, b).flatten(-2) / count[..., None].clamp(min=1)
    return z + F.linear(o, weight, bias)
