"""Define LayerNorm with a projection in plain torch: the truth, run it in float64."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def norm_linear_rows(
    x: Tensor, gain: Tensor | None, shift: Tensor | None, weight: Tensor
) -> Tensor:
    """Compute LN(x) W^T.

    Args:
        x: [B, I, J, C].
        gain: scale of the LayerNorm [C] or None.
        shift: shift of the LayerNorm [C] or None.
        weight: [O, C].

    Returns:
        [B, I, J, O].

    Source: AlphaFold 3, Algorithm 14.
    """
    return F.linear(F.layer_norm(x, x.shape[-1:], gain, shift, 1e-5), weight)


def norm_linear_planes(
    x: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Compute LN(x) W^T + bias, channels first.

    Args:
        x: [B, I, J, C].
        gain: scale of the LayerNorm [C] or None.
        shift: shift of the LayerNorm [C] or None.
        weight: [O, C].
        bias: [O] or None.

    Returns:
        [B, O, I, J].

    Source: AlphaFold 3, Algorithms 14, 20 and 24.
    """
    y = F.linear(F.layer_norm(x, x.shape[-1:], gain, shift, 1e-5), weight, bias)
    return y.permute(0, 3, 1, 2)
