"""Gradients of attention with an additive bias: three kernels, no atomics, so that they repeat.

    p = exp(s - r - m), r + m = lse;  ds = p * (dout v^T - delta);  dv = p^T dout
    dq = scale ds k;  dk = scale ds^T q
    dbias = sum over the batch rows that share it of ds;  delta = sum_d dout o - dlse

The logits are those of the forward, to the rounding of q: bias less r first, see fused.py.

Source: FlashAttention-2 (Dao 2023), Algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from foldcp_kernels.attention.fused import LN2, LOG2E, attention_fwd, takes_dots
from foldcp_kernels.attention.order import place_program
from foldcp_kernels.core.recompute import once
from foldcp_kernels.core.triton_configs import pick
from foldcp_kernels.core.triton_launch import capability, cdiv, launch, next_power_of_2
from foldcp_kernels.norm_linear.fused import exactness


@triton.jit
def _load(p_x, s_x, o_row, m_row, o_d, D: tl.constexpr):
    """A block of rows [B, BD] of a [.., rows, D] tensor; zero past its ends."""
    o_x = o_row.to(tl.int64)[:, None] * s_x[3] + o_d[None, :]
    return tl.load(p_x + o_x, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def _at(p_x, s_x, i_b, i_r, i_h):
    return p_x + i_b * s_x[0] + i_r * s_x[1] + i_h * s_x[2]


@triton.jit
def _scaled(b_q, scale, WIDE: tl.constexpr):
    """(q, factor of its products in log2 units): scaled and rounded as in the forward, whose
    weights must come out again; float32 is left as it is unless WIDE, whichever spills less.
    """
    if b_q.dtype == tl.float32 and not WIDE:
        return b_q, scale * LOG2E
    return (b_q.to(tl.float32) * (scale * LOG2E)).to(b_q.dtype), 1.0


@triton.jit
def _load_lse(p_r, p_m, o_l, m_i):
    """(r, m in log2 units)."""
    b_m = tl.load(p_m + o_l, mask=m_i, other=0.0) * LOG2E
    return tl.load(p_r + o_l, mask=m_i, other=0.0), b_m


@triton.jit
def _weights(
    b_q, b_k, p_bias, p_keep, s_bias, o_i, o_k, m_i, m_k, b_r, b_m, factor, EXACT: tl.constexpr
):  # fmt: skip
    """Weights [BI, BK]; 0 where there is no such key. b_q and factor come from `_scaled`."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=EXACT)  # [BI, BD] @ [BD, BK] -> [BI, BK]
    m_s = m_i[:, None] & m_k[None, :]
    if p_bias is not None:
        p_tile = (
            p_bias + o_i.to(tl.int64)[:, None] * s_bias[2] + o_k.to(tl.int64)[None, :] * s_bias[3]
        )
        b_b = tl.load(p_tile, mask=m_s, other=0.0).to(tl.float32)
        b_s = b_s * (takes_dots(b_r) * factor)[:, None] + (b_b - b_r[:, None]) * LOG2E
    else:
        b_s *= factor
    if p_keep is not None:
        m_s = m_s & (tl.load(p_keep + o_k, mask=m_k, other=0) != 0)[None, :]
    return tl.exp2(tl.where(m_s, b_s - b_m[:, None], float("-inf")))


@triton.jit
def _dq_kernel(
    p_q, p_k, p_v, p_bias, p_keep, p_do, p_r, p_m, p_delta, p_dq,
    s_q, s_k, s_v, s_bias, s_do, s_dq, sizes, scale,
    D: tl.constexpr, BD: tl.constexpr, EXACT: tl.constexpr, GROUP: tl.constexpr, BI: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    rows, heads, queries, keys = sizes
    i_i, i_h, i_b, i_r = place_program(tl.program_id(0), tl.cdiv(queries, BI), heads, rows, GROUP)
    i_h, i_b, i_r = i_h.to(tl.int64), i_b.to(tl.int64), i_r.to(tl.int64)
    i_g = i_b * rows + i_r
    o_i = i_i * BI + tl.arange(0, BI)
    m_i, o_d = o_i < queries, tl.arange(0, BD)
    b_q = _load(_at(p_q, s_q, i_b, i_r, i_h), s_q, o_i, m_i, o_d, D)
    b_q, factor = _scaled(b_q, scale, False)
    b_do = _load(_at(p_do, s_do, i_b, i_r, i_h), s_do, o_i, m_i, o_d, D)
    o_l = (i_g * heads + i_h) * queries + o_i
    b_r, b_m = _load_lse(p_r, p_m, o_l, m_i)
    b_delta = tl.load(p_delta + o_l, mask=m_i, other=0.0)
    p_k, p_v = _at(p_k, s_k, i_b, i_r, i_h), _at(p_v, s_v, i_b, i_r, i_h)
    if p_bias is not None:
        p_bias += i_b * s_bias[0] + i_h * s_bias[1]
    if p_keep is not None:
        p_keep += i_g * keys
    b_dq = tl.zeros([BI, BD], tl.float32)
    for lo in tl.range(0, keys, BK):
        o_k = lo + tl.arange(0, BK)
        m_k = o_k < keys
        b_k, b_v = _load(p_k, s_k, o_k, m_k, o_d, D), _load(p_v, s_v, o_k, m_k, o_d, D)
        b_p = _weights(
            b_q, b_k, p_bias, p_keep, s_bias, o_i, o_k, m_i, m_k, b_r, b_m, factor, EXACT
        )  # fmt: skip
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=EXACT)  # [BI, BD] @ [BD, BK] -> [BI, BK]
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_k.dtype)
        b_dq = tl.dot(b_ds, b_k, b_dq, input_precision=EXACT)  # [BI, BK] @ [BK, BD] -> [BI, BD]
    o_q = o_i.to(tl.int64)[:, None] * s_dq[3] + o_d[None, :]
    m_q = m_i[:, None] & (o_d < D)[None, :]
    tl.store(
        _at(p_dq, s_dq, i_b, i_r, i_h) + o_q, (b_dq * scale).to(p_dq.dtype.element_ty), mask=m_q
    )


@triton.jit
def _dkv_kernel(
    p_q, p_k, p_v, p_bias, p_keep, p_do, p_r, p_m, p_delta, p_dk, p_dv,
    s_q, s_k, s_v, s_bias, s_do, s_dk, sizes, scale,
    D: tl.constexpr, BD: tl.constexpr, EXACT: tl.constexpr, GROUP: tl.constexpr, BI: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    rows, heads, queries, keys = sizes
    i_k, i_h, i_b, i_r = place_program(tl.program_id(0), tl.cdiv(keys, BK), heads, rows, GROUP)
    i_h, i_b, i_r = i_h.to(tl.int64), i_b.to(tl.int64), i_r.to(tl.int64)
    i_g = i_b * rows + i_r
    o_k = i_k * BK + tl.arange(0, BK)
    m_k, o_d = o_k < keys, tl.arange(0, BD)
    b_k = _load(_at(p_k, s_k, i_b, i_r, i_h), s_k, o_k, m_k, o_d, D)
    b_v = _load(_at(p_v, s_v, i_b, i_r, i_h), s_v, o_k, m_k, o_d, D)
    p_q, p_do = _at(p_q, s_q, i_b, i_r, i_h), _at(p_do, s_do, i_b, i_r, i_h)
    if p_bias is not None:
        p_bias += i_b * s_bias[0] + i_h * s_bias[1]
    if p_keep is not None:
        p_keep += i_g * keys
    b_dk, b_dv = tl.zeros([BK, BD], tl.float32), tl.zeros([BK, BD], tl.float32)
    for lo in tl.range(0, queries, BI):
        o_i = lo + tl.arange(0, BI)
        m_i = o_i < queries
        b_q, factor = _scaled(_load(p_q, s_q, o_i, m_i, o_d, D), scale, True)
        b_do = _load(p_do, s_do, o_i, m_i, o_d, D)
        o_l = (i_g * heads + i_h) * queries + o_i
        b_r, b_m = _load_lse(p_r, p_m, o_l, m_i)
        b_delta = tl.load(p_delta + o_l, mask=m_i, other=0.0)
        b_p = _weights(
            b_q, b_k, p_bias, p_keep, s_bias, o_i, o_k, m_i, m_k, b_r, b_m, factor, EXACT
        )  # fmt: skip
        b_pt = tl.trans(b_p).to(b_do.dtype)
        b_dv = tl.dot(b_pt, b_do, b_dv, input_precision=EXACT)  # [BK, BI] @ [BI, BD] -> [BK, BD]
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=EXACT)  # [BI, BD] @ [BD, BK] -> [BI, BK]
        b_ds = tl.trans(b_p * (b_dp - b_delta[:, None])).to(b_q.dtype)
        b_dk = tl.dot(b_ds, b_q, b_dk, input_precision=EXACT)  # [BK, BI] @ [BI, BD] -> [BK, BD]
    o_kd = o_k.to(tl.int64)[:, None] * s_dk[3] + o_d[None, :]
    m_kd = m_k[:, None] & (o_d < D)[None, :]
    p_dk, p_dv = _at(p_dk, s_dk, i_b, i_r, i_h), _at(p_dv, s_dk, i_b, i_r, i_h)
    tl.store(p_dk + o_kd, (b_dk * LN2).to(p_dk.dtype.element_ty), mask=m_kd)
    tl.store(p_dv + o_kd, b_dv.to(p_dv.dtype.element_ty), mask=m_kd)


@triton.jit
def _dbias_kernel(
    p_q, p_k, p_v, p_bias, p_keep, p_do, p_r, p_m, p_delta, p_db,
    s_q, s_k, s_v, s_bias, s_do, sizes, scale,
    D: tl.constexpr, BD: tl.constexpr, EXACT: tl.constexpr, GROUP: tl.constexpr, BI: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    rows, heads, queries, keys = sizes
    # All lines are in the loop: query blocks are what GROUP puts side by side with key blocks.
    i_blocks, k_blocks = tl.cdiv(queries, BI), tl.cdiv(keys, BK)
    i_k, i_h, i_b, i_i = place_program(tl.program_id(0), k_blocks, heads, i_blocks, GROUP)
    i_h, i_b = i_h.to(tl.int64), i_b.to(tl.int64)
    i_bh = i_b * heads + i_h
    o_i, o_k = i_i * BI + tl.arange(0, BI), i_k * BK + tl.arange(0, BK)
    m_i, m_k, o_d = o_i < queries, o_k < keys, tl.arange(0, BD)
    p_tile = p_bias + i_b * s_bias[0] + i_h * s_bias[1]
    b_db = tl.zeros([BI, BK], tl.float32)
    for r in tl.range(0, rows):
        i_r = tl.cast(r, tl.int64)
        b_q = _load(_at(p_q, s_q, i_b, i_r, i_h), s_q, o_i, m_i, o_d, D)
        b_q, factor = _scaled(b_q, scale, False)
        b_k = _load(_at(p_k, s_k, i_b, i_r, i_h), s_k, o_k, m_k, o_d, D)
        b_do = _load(_at(p_do, s_do, i_b, i_r, i_h), s_do, o_i, m_i, o_d, D)
        b_v = _load(_at(p_v, s_v, i_b, i_r, i_h), s_v, o_k, m_k, o_d, D)
        o_l = ((i_b * rows + i_r) * heads + i_h) * queries + o_i
        b_r, b_m = _load_lse(p_r, p_m, o_l, m_i)
        b_delta = tl.load(p_delta + o_l, mask=m_i, other=0.0)
        p_row = p_keep
        if p_keep is not None:
            p_row = p_keep + (i_b * rows + i_r) * keys
        b_p = _weights(
            b_q, b_k, p_tile, p_row, s_bias, o_i, o_k, m_i, m_k, b_r, b_m, factor, EXACT
        )  # fmt: skip
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=EXACT)  # [BI, BD] @ [BD, BK] -> [BI, BK]
        b_db += b_p * (b_dp - b_delta[:, None])
    o_db = (i_bh * queries + o_i.to(tl.int64)[:, None]) * keys + o_k[None, :]
    tl.store(p_db + o_db, b_db, mask=m_i[:, None] & m_k[None, :])


def attention_bwd(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, keep: Tensor | None,
    o: Tensor, r: Tensor, m: Tensor, dout: Tensor, dlse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Compute the gradients of `attention_fwd` over all keys.

    Args:
        q: as in the forward.
        k: as in the forward.
        v: as in the forward.
        bias: as in the forward.
        scale: as in the forward.
        keep: as in the forward.
        o: output of the forward.
        r: reference of its logits, of `Carry`.
        m: bound of its logits, of `Carry`.
        dout: [G0, G1, H, I, D].
        dlse: [G0, G1, H, I] or None.

    Returns:
        dq, dk, dv like q, k, v; dbias [G0, 1, H, I, K] in float32, None without a bias.

    Source: FlashAttention-2, Algorithm 2.
    """
    g0, g1, h, i, d = q.shape
    keys = k.shape[3]
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    delta = (dout.float() * o.float()).sum(-1)
    delta = (delta if dlse is None else delta - dlse).contiguous()
    dq, dk = (x.new_empty(x.shape) for x in (q, k))
    dv = torch.empty_like(dk)
    keep = None if keep is None else keep.contiguous().view(torch.uint8)
    s_bias = None if bias is None else (bias.stride(0), *bias.stride()[2:])
    inputs = (q, k, v, bias, keep, dout, r, m, delta)
    strides = (*(x.stride()[:4] for x in (q, k, v)), s_bias, dout.stride()[:4])
    sizes = (g1, h, i, keys)

    def run(name: str, kernel: Any, grid: Callable[[int, int], int], *rest: Any) -> None:
        width = 32 if d <= 32 else 64
        config = pick(f"attention_{name}_{width}", q.element_size(), capability(q.device))
        programs = grid(cdiv(i, config.blocks["BI"]), cdiv(keys, config.blocks["BK"]))
        launch(
            kernel, (programs,), *inputs, *rest, sizes, float(scale), D=d,
            BD=max(16, next_power_of_2(d)), EXACT=exactness(q.dtype), **config.options(),
        )  # fmt: skip

    run("dq", _dq_kernel, lambda bi, _: g0 * g1 * h * bi, dq, *strides, dq.stride()[:4])
    run("dkv", _dkv_kernel, lambda _, bk: g0 * g1 * h * bk, dk, dv, *strides, dk.stride()[:4])
    if bias is None:
        return dq, dk, dv, None
    dbias = q.new_empty((g0, 1, h, i, keys), dtype=torch.float32)
    run("dbias", _dbias_kernel, lambda bi, bk: g0 * h * bi * bk, dbias, *strides)
    return dq, dk, dv, dbias


class Attention(torch.autograd.Function):
    """(o, r, m) of attention over all keys; o and m have gradients, so that panels merge."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float,
        keep: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Run `attention_fwd` over all keys.

        Args:
            q: as in `attention_fwd`.
            k: as in `attention_fwd`.
            v: as in `attention_fwd`.
            bias: as in `attention_fwd`.
            scale: as in `attention_fwd`.
            keep: as in `attention_fwd`.

        Returns:
            The output, r and m of `Carry`.
        """
        o, r, m, _ = attention_fwd(q, k, v, bias, scale, keep)
        ctx.save_for_backward(q, k, v, bias, keep, o, r, m)
        ctx.scale = scale
        ctx.mark_non_differentiable(r)
        return o, r, m

    @staticmethod
    @once
    def backward(ctx: Any, dout: Tensor, _: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        """Run `attention_bwd`.

        Args:
            dout: gradient of the output.
            dlse: gradient of m, and so of the lse.
        """
        q, k, v, bias, keep, o, r, m = ctx.saved_tensors
        dq, dk, dv, dbias = attention_bwd(q, k, v, bias, ctx.scale, keep, o, r, m, dout, dlse)
        if bias is not None:
            dbias = dbias.sum_to_size(bias.shape).to(bias.dtype)
        return dq, dk, dv, dbias, None, None
