"""Projections of triangle attention: queries, keys and values of lines, and the bias.

What travels between ranks is written as it travels: a panel of keys, values or bias is contiguous,
or a few long runs.

Source: AlphaFold 3 supplement, Algorithms 14 and 15 (first lines).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from foldcp_kernels.adaptive_norm import adaptive_norm
from foldcp_kernels.core.chunking import by_panel
from foldcp_kernels.core.dispatch import compute_dtype, derived
from foldcp_kernels.core.recompute import recompute
from foldcp_kernels.norm_linear import EPS, choose_rows, norm_linear_planes

if TYPE_CHECKING:
    from foldcp_kernels.triangle_attention.definition import TriangleAttentionWeights


@dataclass(frozen=True)
class Lines:
    """Queries, keys and values of a chunk of lines.

    Args:
        q: [B, I, J, H, D].
        kv: panels of positions [B, I, K, 2HD], k first, what travels.
        scale: remaining factor on q.k; ln 2 when q was multiplied by scale * log2(e) already.
    """

    q: Tensor
    kv: tuple[Tensor, ...]
    scale: float


def project_bias(z: Tensor, w: TriangleAttentionWeights, impl: str | None = None) -> Tensor:
    """Project a tile (or its transpose) to the triangle bias: [B, I, J, C] -> [B, H, I, J].

    Args:
        z: pair tile [B, I, J, C].
        w: weights.
        impl: see `dispatch`.
    """
    return norm_linear_planes(z, w.norm_weight, w.norm_bias, w.bias, impl=impl)


def bias_panels(z: Tensor, w: TriangleAttentionWeights, panels: int) -> tuple[Tensor, ...]:
    """Project the bias panel by panel of the keys, as it travels: [B, H, I, J / panels] each.

    Args:
        z: pair tile [B, I, J, C].
        w: weights.
        panels: their number; it divides J.
    """
    if panels == 1:
        return (project_bias(z, w),)
    if torch.is_grad_enabled():
        return project_bias(z, w).chunk(panels, 3)
    b, i, j, _ = z.shape
    out = z.new_empty((b, panels, w.heads, i, j // panels), dtype=compute_dtype(z))
    for sample, part in zip(z, out, strict=True):
        x = by_panel(sample, panels)
        norm_linear_planes(x, w.norm_weight, w.norm_bias, w.bias, out=part)
    return out.unbind(1)


def project_lines(
    x: Tensor, w: TriangleAttentionWeights, impl: str | None = None, panels: int = 1
) -> Lines:
    """Project lines to queries, and to the keys and values that travel.

    Args:
        x: lines of z [B, I, J, C], any strides.
        w: weights.
        impl: see `dispatch`.
        panels: of the keys and values, equal parts of J.
    """
    if choose_rows("triangle_attention", impl, x, "z", (x.shape[-1],)) != "triton":
        x = w.norm(x)
        kv = (torch.cat((F.linear(p, w.k), F.linear(p, w.v)), -1) for p in x.chunk(panels, 2))
        return _lines(F.linear(x, w.q), tuple(kv), w)
    from foldcp_kernels.norm_linear.fused import norm_linear_fwd

    hd, dtype, build = w.q.shape[0], compute_dtype(x), _stack(x, w)
    if torch.is_grad_enabled():

        def fused(x: Tensor, gain: Tensor, shift: Tensor, *qkv: Tensor) -> Tensor:
            return norm_linear_fwd(x, gain, shift, derived("qkv", qkv, build, dtype), planes=False)

        def twin(x: Tensor, gain: Tensor, shift: Tensor, *qkv: Tensor) -> Tensor:
            return F.linear(F.layer_norm(x, x.shape[-1:], gain, shift, EPS), build(*qkv))

        qkv = recompute(fused, twin, x, w.norm_weight, w.norm_bias, w.q, w.k, w.v)
        return _lines(qkv[..., :hd], qkv[..., hd:].chunk(panels, 2), w, True)
    b, i, j, _ = x.shape
    q = x.new_empty((b, i, j, hd), dtype=dtype)
    kv = x.new_empty((b, panels, i, j // panels, 2 * hd), dtype=dtype)
    stacked = derived("qkv", (w.q, w.k, w.v), build, dtype)
    parts = [(x, q, kv[:, 0])]
    if panels > 1:
        parts = [(by_panel(x[n], panels), by_panel(q[n], panels), kv[n]) for n in range(b)]
    for part, out, rest in parts:
        norm = w.norm_weight, w.norm_bias
        norm_linear_fwd(part, *norm, stacked, planes=False, out=out, rest=rest)
    return _lines(q, kv.unbind(1), w, True)


def norm_lines(x: Tensor, w: TriangleAttentionWeights) -> Tensor:
    """Normalise lines in the compute dtype, contiguous: [B, I, J, C].

    Args:
        x: lines of z [B, I, J, C], any strides.
        w: weights.
    """
    gain, shift = (t.expand(1, *x.shape[2:]) for t in (w.norm_weight, w.norm_bias))
    parts = [adaptive_norm(sample, gain, shift) for sample in x]
    return parts[0][None] if len(parts) == 1 else torch.stack(parts)


def project_normed(x: Tensor, w: TriangleAttentionWeights) -> Lines:
    """Project what `norm_lines` made, in one panel, see `project_lines`.

    Args:
        x: from `norm_lines`.
        w: weights.
    """
    if choose_rows("triangle_attention", None, x, "z", (x.shape[-1],)) != "triton":
        kv = torch.cat((F.linear(x, w.k), F.linear(x, w.v)), -1)
        return _lines(F.linear(x, w.q), (kv,), w)
    build, weights = _stack(x, w), (w.q, w.k, w.v)
    grad = torch.is_grad_enabled()
    qkv = F.linear(x, build(*weights) if grad else derived("qkv", weights, build, compute_dtype(x)))
    hd = w.q.shape[0]
    return _lines(qkv[..., :hd], (qkv[..., hd:],), w, True)


def _stack(x: Tensor, w: TriangleAttentionWeights) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Stacks the weights of q, k and v in the compute dtype, q with its factor in powers of two."""
    dtype, folded = compute_dtype(x), _scale(w) * math.log2(math.e)

    def build(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([q * folded, k, v]).to(dtype).contiguous()

    return build


def _scale(w: TriangleAttentionWeights) -> float:
    return (w.q.shape[0] // w.heads) ** -0.5


def _lines(
    q: Tensor, kv: tuple[Tensor, ...], w: TriangleAttentionWeights, folded: bool = False
) -> Lines:
    return Lines(q.unflatten(-1, (w.heads, -1)), kv, math.log(2) if folded else _scale(w))
