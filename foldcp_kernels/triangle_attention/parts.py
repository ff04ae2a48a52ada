"""The parts of a triangle attention that a mesh runs: lines and bias, attention, output.

What travels between ranks is written as it travels: a panel of keys, values or bias is contiguous,
or a few long runs. What runs each part is chosen before any of them runs.

Source: AlphaFold 3 supplement, Algorithms 14 and 15.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from foldcp_kernels.adaptive_norm import ADAPTIVE_NORM
from foldcp_kernels.attention import attend_next, attend_some
from foldcp_kernels.attention.carry import Carry, merge
from foldcp_kernels.core.chunking import by_panel
from foldcp_kernels.core.dispatch import compute_dtype
from foldcp_kernels.core.op import Op
from foldcp_kernels.core.weight_cache import derived
from foldcp_kernels.gated_output import GATED_OUTPUT
from foldcp_kernels.norm_linear import EPS, PLANES, refusal, slower
from foldcp_kernels.triangle_attention.choice import Parts
from foldcp_kernels.triangle_attention.definition import TriangleAttentionWeights
from foldcp_kernels.triangle_attention.masks import kept


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


def project_bias(z: Tensor, w: TriangleAttentionWeights, parts: Parts) -> Tensor:
    """Project a tile (or its transpose) to the triangle bias: [B, I, J, C] -> [B, H, I, J].

    Args:
        z: pair tile [B, I, J, C].
        w: weights.
        parts: from `chosen`.
    """
    return PLANES.run(parts.bias, z, w.norm_weight, w.norm_bias, w.bias, None, None)


def bias_panels(
    z: Tensor, w: TriangleAttentionWeights, parts: Parts, panels: int
) -> tuple[Tensor, ...]:
    """Project the bias panel by panel of the keys, as it travels: [B, H, I, J / panels] each.

    Args:
        z: pair tile [B, I, J, C].
        w: weights.
        parts: from `chosen`.
        panels: their number; it divides J.
    """
    if panels == 1:
        return (project_bias(z, w, parts),)
    if torch.is_grad_enabled():
        return project_bias(z, w, parts).chunk(panels, 3)
    b, i, j, _ = z.shape
    out = z.new_empty((b, panels, w.heads, i, j // panels), dtype=compute_dtype(z))
    for sample, part in zip(z, out, strict=True):
        x = by_panel(sample, panels)
        PLANES.run(parts.bias, x, w.norm_weight, w.norm_bias, w.bias, None, part)
    return out.unbind(1)


def project_lines(x: Tensor, w: TriangleAttentionWeights, parts: Parts, panels: int = 1) -> Lines:
    """Project lines to queries, and to the keys and values that travel.

    Args:
        x: lines of z [B, I, J, C], any strides.
        w: weights.
        parts: from `chosen`.
        panels: of the keys and values, equal parts of J.
    """
    norm = w.norm_weight, w.norm_bias
    if parts.rows != "triton":
        x = w.norm(x)
        panel = (torch.cat((F.linear(p, w.k), F.linear(p, w.v)), -1) for p in x.chunk(panels, 2))
        return _lines(F.linear(x, w.q), tuple(panel), w)
    hd, dtype = w.q.shape[0], compute_dtype(x)
    if torch.is_grad_enabled():
        qkv = _QKV.run("triton", x, *norm, w.q, w.k, w.v, heads=w.heads)
        return _lines(qkv[..., :hd], qkv[..., hd:].chunk(panels, 2), w, True)
    from foldcp_kernels.norm_linear.fused import norm_linear_fwd

    b, i, j, _ = x.shape
    q = x.new_empty((b, i, j, hd), dtype=dtype)
    kv = x.new_empty((b, panels, i, j // panels, 2 * hd), dtype=dtype)
    stacked = _stacked(w.q, w.k, w.v, w.heads, dtype)
    pieces = [(x, q, kv[:, 0])]
    if panels > 1:
        pieces = [(by_panel(x[n], panels), by_panel(q[n], panels), kv[n]) for n in range(b)]
    for piece, out, rest in pieces:
        norm_linear_fwd(piece, *norm, stacked, planes=False, out=out, rest=rest)
    return _lines(q, kv.unbind(1), w, True)


def norm_lines(x: Tensor, w: TriangleAttentionWeights, parts: Parts) -> Tensor:
    """Normalise lines in the compute dtype, contiguous: [B, I, J, C].

    Args:
        x: lines of z [B, I, J, C], any strides.
        w: weights.
        parts: from `chosen`.
    """
    gain, shift = (t.expand(1, *x.shape[2:]) for t in (w.norm_weight, w.norm_bias))
    normed = [ADAPTIVE_NORM.run(parts.norm, one, gain, shift, sigmoid=False) for one in x]
    return normed[0][None] if len(normed) == 1 else torch.stack(normed)


def project_normed(x: Tensor, w: TriangleAttentionWeights, parts: Parts) -> Lines:
    """Project what `norm_lines` made, in one panel, see `project_lines`.

    Args:
        x: from `norm_lines`.
        w: weights.
        parts: from `chosen`.
    """
    if parts.rows != "triton":
        kv = torch.cat((F.linear(x, w.k), F.linear(x, w.v)), -1)
        return _lines(F.linear(x, w.q), (kv,), w)
    stack = _stack if torch.is_grad_enabled() else _stacked
    qkv = F.linear(x, stack(w.q, w.k, w.v, w.heads, compute_dtype(x)))
    hd = w.q.shape[0]
    return _lines(qkv[..., :hd], (qkv[..., hd:],), w, True)


def _stack(q: Tensor, k: Tensor, v: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Stack the weights of q, k and v, q with its factor in powers of two."""
    folded = (len(q) // heads) ** -0.5 * math.log2(math.e)
    return torch.cat([q * folded, k, v]).to(dtype).contiguous()


def _stacked(q: Tensor, k: Tensor, v: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Return what `_stack` does, made once while the weights live."""
    return derived("qkv", (q, k, v), lambda q, k, v: _stack(q, k, v, heads, dtype), dtype)


def _projected(
    x: Tensor, gain: Tensor, shift: Tensor, q: Tensor, k: Tensor, v: Tensor, heads: int
) -> Tensor:
    stack = _stack(q, k, v, heads, compute_dtype(x))
    return F.linear(F.layer_norm(x, x.shape[-1:], gain, shift, EPS), stack)


def _fused() -> Callable[..., Tensor]:
    from foldcp_kernels.norm_linear.fused import norm_linear_fwd

    def run(
        x: Tensor, gain: Tensor, shift: Tensor, q: Tensor, k: Tensor, v: Tensor, heads: int
    ) -> Tensor:
        stack = _stacked(q, k, v, heads, compute_dtype(x))
        return norm_linear_fwd(x, gain, shift, stack, planes=False)

    return run


_QKV = Op(
    "triangle_attention",
    eager=_projected,
    triton=_fused,
    covers=lambda z, *_: refusal(z, "z", (z.shape[-1],)),
    prefers=lambda z, *_: slower(z),
)


def _lines(
    q: Tensor, kv: tuple[Tensor, ...], w: TriangleAttentionWeights, folded: bool = False
) -> Lines:
    scale = math.log(2) if folded else (w.q.shape[0] // w.heads) ** -0.5
    return Lines(q.unflatten(-1, (w.heads, -1)), kv, scale)


def attend_lines(
    lines: Lines,
    kv: Tensor,
    bias: Tensor,
    keep: Tensor | None,
    carry: Carry | None,
    last: bool,
    parts: Parts,
) -> Carry:
    """Attend all positions of the lines to one panel of keys.

    Args:
        lines: from `project_lines`.
        kv: of the panel [B, I, K, 2HD].
        bias: [B, H, J, K].
        keep: mask of the panel's keys [B, I, K], from `key_mask`, or from
            `cuequivariance.prepare`; None keeps all.
        carry: over the panels so far (o [B, I, H, J, D]), None at the first panel.
        last: there is no further panel.
        parts: from `chosen`; cuEquivariance takes all keys only.

    Returns:
        The new carry; from cuEquivariance without lse.
    """
    if keep is not None and keep.dtype != torch.int32:
        keep, least = kept(keep, lines.q.dtype)
    h, d = lines.q.shape[3:]
    hd = h * d
    q = lines.q.transpose(2, 3)
    k, v = (x.unflatten(-1, (h, d)).transpose(2, 3) for x in (kv[..., :hd], kv[..., hd:]))
    if parts.cuequivariance and carry is None and last:
        from foldcp_kernels.triangle_attention.cuequivariance import attention

        o = attention(q, k, v, bias[:, None], lines.scale, keep)
        return Carry(o, o.new_zeros(1), o.new_zeros(1), None)
    if keep is None:
        return attend_next(parts.core, q, k, v, bias[:, None], lines.scale, carry, last)
    new = attend_some(parts.core, q, k, v, bias[:, None], lines.scale, keep)
    return merge(carry, new.lowered(least[..., None, None].to(new.r.dtype)))


def line_output(x: Tensor, carry: Carry, w: TriangleAttentionWeights, parts: Parts) -> Tensor:
    """Return the lines of z with the update that carried attention makes, see `updated_lines`.

    Args:
        x: lines of z [B, I, J, C], any strides.
        carry: over all keys.
        w: weights.
        parts: from `chosen`.

    Returns:
        [B, I, J, C].
    """
    return updated_lines(x, attended(carry), w, parts)


def attended(carry: Carry) -> Tensor:
    """Finish attention over all keys: [B, I, J, HD]."""
    return carry.finish()[0].transpose(2, 3).flatten(-2)


def updated_lines(x: Tensor, o: Tensor, w: TriangleAttentionWeights, parts: Parts) -> Tensor:
    """Add the update to lines of z; in place when gradients are off.

    Args:
        x: lines of z [B, I, J, C], any strides.
        o: from `attended`.
        w: weights.
        parts: from `chosen`.

    Returns:
        [B, I, J, C].
    """
    return GATED_OUTPUT.run(parts.rows, x, w.norm_weight, w.norm_bias, w.g, o, w.o)


def key_mask(mask: Tensor | None) -> Tensor | None:
    """Convert a key mask to the dtype that travels and `attend_lines` takes: bool or float32."""
    return mask if mask is None or mask.dtype == torch.bool else mask.float()


def swapped(mask: Tensor | None) -> Tensor | None:
    """Transpose the mask of a tile; None stays None."""
    return None if mask is None else mask.transpose(1, 2)
