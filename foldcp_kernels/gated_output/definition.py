"""Define the gated output of an attention in plain torch: the truth, run it in float64."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def gated_output(
    x: Tensor, gain: Tensor, shift: Tensor, gate: Tensor, o: Tensor, weight: Tensor
) -> Tensor:
    """Compute x + (sigmoid(LN(x) gate^T) * o) weight^T.

    Args:
        x: [B, I, J, C].
        gain: scale of its LayerNorm [C].
        shift: shift of its LayerNorm [C].
        gate: [W, C].
        o: [B, I, J, W].
        weight: [C, W].

    Source: AlphaFold 3, Algorithm 14.
    """
    g = F.linear(F.layer_norm(x, x.shape[-1:], gain, shift, 1e-5), gate).sigmoid()
    return x + F.linear(g * o, weight)
