"""Hold the weights of a triangle attention, and define it in plain torch: run it in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-5  # of Boltz's LayerNorms


MASKED = 1e9  # what Boltz subtracts from the logit of a masked key


@dataclass(frozen=True)
class TriangleAttentionWeights:
    """Weights of one triangle attention with H heads of D channels.

    norm_weight, norm_bias [C]; bias [H, C]; q, k, v, g [H * D, C]; o [C, H * D].
    """

    norm_weight: Tensor
    norm_bias: Tensor
    bias: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    o: Tensor
    heads: int

    def norm(self, x: Tensor) -> Tensor:
        """Normalise the channels."""
        return F.layer_norm(x, x.shape[-1:], self.norm_weight, self.norm_bias, _EPS)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the weights in order."""
        return tuple(vars(self).values())[:-1]


def triangle_attention(
    z: Tensor, mask: Tensor, w: TriangleAttentionWeights, starting: bool
) -> Tensor:
    """Compute z + triangle attention of z.

    Args:
        z: [B, N, N, C].
        mask: [B, N, N], 1 = keep.
        w: weights.
        starting: Algorithm 14 (True) or 15 (False).

    Source: AlphaFold 3, Algorithms 14 and 15.
    """
    x, keep = (z, mask) if starting else (z.transpose(1, 2), mask.transpose(1, 2))
    x = w.norm(x)
    q, k, v, g = (F.linear(x, m).unflatten(-1, (w.heads, -1)) for m in (w.q, w.k, w.v, w.g))
    logits = torch.einsum("bijhd,bikhd->bihjk", q, k) * q.shape[-1] ** -0.5
    logits = logits + F.linear(x, w.bias).permute(0, 3, 1, 2)[:, None]
    logits = logits + MASKED * (keep.to(z.dtype) - 1)[:, :, None, None, :]
    o = torch.einsum("bihjk,bikhd->bijhd", logits.softmax(-1), v)
    update = F.linear((g.sigmoid() * o).flatten(-2), w.o)
    return z + (update if starting else update.transpose(1, 2))
