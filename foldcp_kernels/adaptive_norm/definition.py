"""Define the adaptive LayerNorm and gated residual in plain torch: the truth, run it in float64."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def adaptive_norm(a: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LN(a) * scale + shift, a [M, n, C], scale and shift [1 or M, n, C]. AlphaFold 3, Alg. 26."""
    return F.layer_norm(a, a.shape[-1:], eps=1e-5) * scale + shift


def gated_residual(a: Tensor, gate: Tensor, x: Tensor) -> Tensor:
    """a + gate * x, a and x [M, n, C], gate [1 or M, n, C]. AlphaFold 3, Algorithms 24 and 25."""
    return a + gate * x
