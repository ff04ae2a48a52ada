"""Every op's definition in plain torch on whole tensors: the ground truth, run it in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from foldcp_kernels.relative_position import Positions, table_index
from foldcp_kernels.transition import TransitionWeights
from foldcp_kernels.triangle_attention import MASKED, TriangleAttentionWeights
from foldcp_kernels.triangle_multiplication import TriangleMultiplicationWeights


def triangle_multiplication(
    z: Tensor, mask: Tensor, w: TriangleMultiplicationWeights, outgoing: bool
) -> Tensor:
    """z + triangle multiplication of z [B, N, N, C], mask [B, N, N]. AlphaFold 3, Alg. 12/13."""
    x = w.norm_in(z)
    p = F.linear(x, w.p_in) * F.linear(x, w.g_in).sigmoid() * mask[..., None].to(z.dtype)
    a, b = p.chunk(2, -1)
    o = torch.einsum("bikd,bjkd->bijd" if outgoing else "bkid,bkjd->bijd", a, b)
    o = F.layer_norm(o, o.shape[-1:], w.norm_out_weight, w.norm_out_bias, 1e-5)
    return z + F.linear(o, w.p_out) * F.linear(x, w.g_out).sigmoid()


def triangle_attention(
    z: Tensor, mask: Tensor, w: TriangleAttentionWeights, starting: bool
) -> Tensor:
    """z + triangle attention of z [B, N, N, C], mask [B, N, N]. AlphaFold 3, Alg. 14/15."""
    x, keep = (z, mask) if starting else (z.transpose(1, 2), mask.transpose(1, 2))
    x = w.norm(x)
    q, k, v, g = (F.linear(x, m).unflatten(-1, (w.heads, -1)) for m in (w.q, w.k, w.v, w.g))
    logits = torch.einsum("bijhd,bikhd->bihjk", q, k) * q.shape[-1] ** -0.5
    logits = logits + F.linear(x, w.bias).permute(0, 3, 1, 2)[:, None]
    logits = logits + MASKED * (keep.to(z.dtype) - 1)[:, :, None, None, :]
    o = torch.einsum("bihjk,bikhd->bijhd", logits.softmax(-1), v)
    update = F.linear((g.sigmoid() * o).flatten(-2), w.o)
    return z + (update if starting else update.transpose(1, 2))


def transition(x: Tensor, w: TransitionWeights) -> Tensor:
    """x + transition of x [..., C]. AlphaFold 3, Algorithm 11."""
    y = F.layer_norm(x, x.shape[-1:], w.norm_weight, w.norm_bias, 1e-5)
    return x + F.linear(F.silu(F.linear(y, w.fc1)) * F.linear(y, w.fc2), w.fc3)


def attention_pair_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """q, k, v [M, N, H, D], bias [1 or M, H, N, N] -> [M, N, H, D]. AlphaFold 3, Algorithm 24."""
    logits = torch.einsum("mihd,mjhd->mhij", q, k) * scale + bias
    return torch.einsum("mhij,mjhd->mihd", logits.softmax(-1), v)


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q [G0, G1, H, I, D], bias [G0, 1, H, I, K], keep bool [G0, G1, K] -> (o, lse)."""
    logits = torch.einsum("abhid,abhkd->abhik", q, k) * scale
    logits = logits if bias is None else logits + bias
    if keep is not None:
        logits = logits.masked_fill(~keep[:, :, None, None], -torch.inf)
    return torch.einsum("abhik,abhkd->abhid", logits.softmax(-1), v), logits.logsumexp(-1)


def outer_product_mean(
    z: Tensor, a: Tensor, b: Tensor, mask: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """z + outer product mean of a, b [B, S, N, D], mask [B, S, N]. AlphaFold 3, Algorithm 9."""
    count = torch.einsum("bsi,bsj->bij", mask, mask).clamp(min=1)
    o = torch.einsum("bsic,bsjd->bijcd", a, b).flatten(-2) / count[..., None]
    return z + F.linear(o, weight, bias)


def pair_weighted_averaging(v: Tensor, logits: Tensor) -> Tensor:
    """v [B, S, N, H, D], logits [B, H, N, N] -> [B, S, N, H, D]. AlphaFold 3, Algorithm 10."""
    return torch.einsum("bhij,bsjhd->bsihd", logits.softmax(-1), v)


def outer_product_mean_tile(
    z: Tensor, a: Tensor, b: Tensor, count: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """`outer_product_mean` of a tile z [B, R, T, C], a [B, S, R, D], b [B, S, T, D], count n_ij."""
    o = torch.einsum("bsic,bsjd->bijcd", a, b).flatten(-2) / count[..., None].clamp(min=1)
    return z + F.linear(o, weight, bias)


def expected_values(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
    other: Tensor | None = None,
    weight_other: Tensor | None = None,
    same: Tensor | None = None,
) -> Tensor:
    """x, other [..., C], weight [bins, C], values [K, bins] -> [K, ...]. AlphaFold 3, sec. 4.3."""
    x = x if other is None else x + other
    logits = F.linear(x, weight, bias)
    if weight_other is not None:
        logits = torch.where(same[..., None], logits, F.linear(x, weight_other, bias))
    return torch.einsum("...b,kb->k...", logits.softmax(-1), values.to(logits.dtype))


def relative_position(table: Tensor, p: Positions) -> Tensor:
    """The table row of each pair [R, T, C]. AlphaFold 3, Algorithm 3."""
    return table[table_index(p).long()]


def adaptive_norm(a: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LN(a) * scale + shift, a [M, n, C], scale and shift [1 or M, n, C]. AlphaFold 3, Alg. 26."""
    return F.layer_norm(a, a.shape[-1:], eps=1e-5) * scale + shift


def gated_residual(a: Tensor, gate: Tensor, x: Tensor) -> Tensor:
    """a + gate * x, a and x [M, n, C], gate [1 or M, n, C]. AlphaFold 3, Algorithms 24 and 25."""
    return a + gate * x
