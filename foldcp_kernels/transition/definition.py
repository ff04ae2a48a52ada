"""Hold the weights of a transition, and define it in plain torch: run it in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class TransitionWeights:
    """norm_weight, norm_bias [C]; fc1, fc2 [hidden, C]; fc3 [C_out, hidden]."""

    norm_weight: Tensor
    norm_bias: Tensor
    fc1: Tensor
    fc2: Tensor
    fc3: Tensor


def transition(x: Tensor, w: TransitionWeights) -> Tensor:
    """Compute x + transition of x [..., C].

    Args:
        x: [..., C].
        w: weights.

    Source: AlphaFold 3, Algorithm 11.
    """
    y = F.layer_norm(x, x.shape[-1:], w.norm_weight, w.norm_bias, 1e-5)
    return x + F.linear(F.silu(F.linear(y, w.fc1)) * F.linear(y, w.fc2), w.fc3)
