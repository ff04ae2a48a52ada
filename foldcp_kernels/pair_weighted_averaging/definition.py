"""Hold the weights of a pair weighted averaging, and define it in torch: run it in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MASKED = 1e6  # what Boltz takes from the logit of a masked pair


@dataclass(frozen=True)
class PairWeightedAveragingWeights:
    """Weights with H heads of D channels.

    norm_m_weight, norm_m_bias [C_m]; norm_z_weight, norm_z_bias [C_z]; m, g [H * D, C_m];
    z [H, C_z]; o [C_m, H * D].
    """

    norm_m_weight: Tensor
    norm_m_bias: Tensor
    norm_z_weight: Tensor
    norm_z_bias: Tensor
    m: Tensor
    g: Tensor
    z: Tensor
    o: Tensor
    heads: int

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the weights in order."""
        return tuple(vars(self).values())[:-1]


def pair_weighted_averaging(
    m: Tensor, z: Tensor, mask: Tensor, w: PairWeightedAveragingWeights
) -> Tensor:
    """Compute m + pair weighted averaging of m.

    Args:
        m: [B, S, N, C_m].
        z: [B, N, N, C_z].
        mask: pairs that count [B, N, N], 1 = keep.
        w: weights.

    Source: AlphaFold 3, Algorithm 10.
    """
    x = F.layer_norm(m, m.shape[-1:], w.norm_m_weight, w.norm_m_bias, 1e-5)
    pairs = F.layer_norm(z, z.shape[-1:], w.norm_z_weight, w.norm_z_bias, 1e-5)
    v, g = (F.linear(x, of).unflatten(-1, (w.heads, -1)) for of in (w.m, w.g))
    logits = F.linear(pairs, w.z) + (MASKED * (mask.to(z.dtype) - 1))[..., None]
    o = weighted_average(v, logits.permute(0, 3, 1, 2))
    return m + F.linear((g.sigmoid() * o).flatten(-2), w.o)


def weighted_average(v: Tensor, logits: Tensor) -> Tensor:
    """Average values over all tokens with weights from pair logits.

    Args:
        v: [B, S, N, H, D].
        logits: [B, H, N, N].

    Returns:
        The averages [B, S, N, H, D].
    """
    return torch.einsum("bhij,bsjhd->bsihd", logits.softmax(-1), v)
