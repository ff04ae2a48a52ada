"""Attention in torch: the weights of all keys of some queries at once.

    r_i = max_k bias_ik;  s_ik = scale q_i . k_k + (bias_ik - r_i);  m_i = log sum_k exp s_ik
    o_i = sum_k p_ik v_k,  p_ik = exp(s_ik - m_i), divided by their sum

Source: AlphaFold 3 supplement, Algorithm 24; FlashAttention-2 (Dao 2023), section 2.2 (gradients).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from foldcp_kernels.attention.carry import ABSORBED
from foldcp_kernels.core.chunking import chunk_length, spans
from foldcp_kernels.core.recompute import once


def weighted(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend to one set of keys.

    Args:
        q: [G, H, I, D].
        k: [G, H, K, D].
        v: [G, H, K, D].
        bias: broadcastable to [G, H, I, K], all keys given.
        scale: factor on q . k.

    Returns:
        (o, r, m): as q, and [G, H, I] in float32 or wider, see `carry.Carry`.

    Source: FlashAttention-2, section 2.2.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, bias)):
        return _Weighted.apply(q, k, v, bias, scale)
    if q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64):
        bias = bias.to(q.dtype)
        r, take = _reference(bias)
        # It reads neighbours in memory as neighbouring channels.
        o, m = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *unit_stride(q * take, k, v), 0.0, False, attn_mask=bias - r, scale=scale
        )
        return o, r.squeeze(-1).expand_as(m), m
    g, h, i, _ = q.shape
    out = q.new_empty(q.shape)
    r, m = q.new_empty((2, g, h, i), dtype=_wide(q))
    row = 12 * h * k.shape[2]  # bytes of the logits and weights of one query row
    groups, rows = chunk_length(g, row * i, q.device), chunk_length(i, row, q.device)
    for a, b in spans(g, groups):
        shared = bias if bias.shape[0] == 1 else bias[a:b]
        for lo, hi in spans(i, rows if groups == 1 else i):
            part = shared if shared.shape[2] == 1 else shared[:, :, lo:hi]
            at = (slice(a, b), slice(None), slice(lo, hi))
            out[at], r[at], m[at], *_ = _weigh(q[at], k[a:b], v[a:b], part, scale)
    return out, r, m


def unit_stride(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Make channels neighbours in memory, by a copy where they are not."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _wide(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _reference(bias: Tensor) -> tuple[Tensor, Tensor]:
    """The largest bias of each row, and 1 where q . k counts beside it, else 0; [.., 1]."""
    r = bias.amax(-1, keepdim=True)
    return r, (r.abs() <= ABSORBED).to(r.dtype)


def _weigh(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(o, r, m, weights, their sums); in float32 or wider but o."""
    with torch.autocast(q.device.type, enabled=False):
        wide = _wide(q)
        bias = bias.to(wide)
        r, take = _reference(bias)
        if q.dtype == torch.float16:  # products that pass its largest number before they are scaled
            fold = 2.0 ** math.floor(math.log2(abs(scale) or 1.0))
            q, scale = q * fold, scale / fold
        p = (q @ k.transpose(-1, -2)).to(wide)
        p = p.mul_(take * scale).add_(bias - r)
        top = p.amax(-1, keepdim=True)
        p = p.sub_(top).exp_()
        total = p.sum(-1, keepdim=True)
        m = (top + total.log()).squeeze(-1)
        # 16 bits hold no sum of all values: their weights are divided first.
        o = (p @ v).div_(total) if v.dtype == wide else (p / total).to(v.dtype) @ v
        return o, r.squeeze(-1).expand_as(m), m, p, total


class _Weighted(torch.autograd.Function):
    """(o, r, m); keeps the weights, which are normalised whatever the size of the logits."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        o, r, m, p, total = _weigh(q, k, v, bias, scale)
        ctx.save_for_backward(q, k, v, p.div_(total))
        ctx.scale, ctx.bias = scale, (bias.shape, bias.dtype)
        r = r.contiguous()
        ctx.mark_non_differentiable(r)
        return o, r, m

    @staticmethod
    @once
    def backward(ctx: Any, dout: Tensor, _: Tensor, dm: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, p = ctx.saved_tensors
        needs, (shape, dtype) = ctx.needs_input_grad, ctx.bias
        dq = dk = dv = dbias = None
        with torch.autocast(q.device.type, enabled=False):
            if needs[2]:
                dv = p.to(dout.dtype).transpose(-1, -2) @ dout
            ds = (dout @ v.transpose(-1, -2)).to(p.dtype).mul_(p)
            # Not dout . o: where one key takes all, the difference is zero to the bit.
            ds = ds.addcmul_(p, ds.sum(-1, keepdim=True) - dm[..., None], value=-1)
            if needs[3]:
                dbias = ds.sum_to_size(shape).to(dtype)
            ds = ds.to(q.dtype)
            if needs[0]:
                dq = (ds @ k).mul_(ctx.scale)
            if needs[1]:
                dk = (ds.transpose(-1, -2) @ q).mul_(ctx.scale)
        return dq, dk, dv, dbias, None
