"""Hold the weights of a triangle multiplication, and define it in torch: run it in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-5  # of Boltz's LayerNorms


@dataclass(frozen=True)
class TriangleMultiplicationWeights:
    """Weights of one triangle multiplication; C input channels, D hidden channels.

    norm_in_weight, norm_in_bias [C]; p_in, g_in [2D, C]; norm_out_weight, norm_out_bias [D];
    p_out [C, D]; g_out [C, C].
    """

    norm_in_weight: Tensor
    norm_in_bias: Tensor
    p_in: Tensor
    g_in: Tensor
    norm_out_weight: Tensor
    norm_out_bias: Tensor
    p_out: Tensor
    g_out: Tensor

    def norm_in(self, x: Tensor) -> Tensor:
        """Normalise the input channels."""
        return F.layer_norm(x, x.shape[-1:], self.norm_in_weight, self.norm_in_bias, _EPS)


def triangle_multiplication(
    z: Tensor, mask: Tensor, w: TriangleMultiplicationWeights, outgoing: bool
) -> Tensor:
    """Compute z + triangle multiplication of z.

    Args:
        z: [B, N, N, C].
        mask: [B, N, N], 1 = keep.
        w: weights.
        outgoing: Algorithm 12 (True) or 13 (False).

    Source: AlphaFold 3, Algorithms 12 and 13.
    """
    o = contraction(z, mask, w, outgoing)
    o = F.layer_norm(o, o.shape[-1:], w.norm_out_weight, w.norm_out_bias, 1e-5)
    return z + F.linear(o, w.p_out) * F.linear(w.norm_in(z), w.g_out).sigmoid()


def contraction(
    z: Tensor, mask: Tensor, w: TriangleMultiplicationWeights, outgoing: bool, fp8: bool = False
) -> Tensor:
    """Compute sum_k a_ik b_jk (outgoing) or sum_k a_ki b_kj (incoming): [B, N, N, D].

    Args:
        z: [B, N, N, C].
        mask: [B, N, N], 1 = keep.
        w: weights.
        outgoing: Algorithm 12 (True) or 13 (False).
        fp8: round a and b to e4m3, with a power of two per channel that follows from the weights.
    """
    x = w.norm_in(z)
    p = F.linear(x, w.p_in) * F.linear(x, w.g_in).sigmoid() * mask[..., None].to(z.dtype)
    if fp8:
        length = (w.p_in * w.norm_in_weight).square().sum(1).sqrt()
        most = z.shape[-1] ** 0.5 * length + (w.p_in @ w.norm_in_bias).abs()
        scale = 2 ** (most / 448).log2().ceil()
        p = (p / scale).to(torch.float8_e4m3fn).to(p.dtype) * scale
    a, b = p.chunk(2, -1)
    return torch.einsum("bikd,bjkd->bijd" if outgoing else "bkid,bkjd->bijd", a, b)
