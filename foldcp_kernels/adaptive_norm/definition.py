"""Define the adaptive LayerNorm and gated residual in plain torch: the truth, run it in float64."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def adaptive_norm(a: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Compute LN(a) * scale + shift.

    Args:
        a: [M, n, C].
        scale: [1 or M, n, C].
        shift: [1 or M, n, C].

    Source: AlphaFold 3, Algorithm 26.
    """
    return F.layer_norm(a, a.shape[-1:], eps=1e-5) * scale + shift


def gated_residual(a: Tensor, gate: Tensor, x: Tensor) -> Tensor:
    """Compute a + gate * x.

    Args:
        a: [M, n, C].
        gate: [1 or M, n, C].
        x: [M, n, C].

    Source: AlphaFold 3, Algorithms 24 and 25.
    """
    return a + gate * x
