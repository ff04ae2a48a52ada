"""Define pair weighted averaging in plain torch: the truth, run it in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def pair_weighted_averaging(v: Tensor, logits: Tensor) -> Tensor:
    """Average values over all tokens with weights from pair logits.

    Args:
        v: [B, S, N, H, D].
        logits: [B, H, N, N].

    Returns:
        The averages [B, S, N, H, D].

    Source: AlphaFold 3, Algorithm 10.
    """
    return torch.einsum("bhij,bsjhd->bsihd", logits.softmax(-1), v)
