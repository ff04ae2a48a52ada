"""Define the outer product mean in plain torch: the truth, run it in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def outer_product_mean(
    z: Tensor, a: Tensor, b: Tensor, mask: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """Compute z + outer product mean."""
    count = torch.einsum("bsi,bsj->bij", mask, mask).clamp(min=1)
    o = torch.einsum("bsic,bsjd->bijcd", a, b).flatten(-2) / count[..., None]
    return z + F.linear(o, weight, bias)


def outer_product_mean_tile(
    z: Tensor, a: Tensor, b: Tensor, count: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """Compute `outer_product_mean` of a tile."""
    o = torch.einsum("bsic,bsjd->bijcd", a, b).flatten(-2) / count[..., None].clamp(min=1)
    return z + F.linear(o, weight, bias)
