"""Attention with an additive bias: softmax over key blocks, carried over panels of keys.

    r_i: the largest bias_ik so far;  s_ik = scale q_i . k_k + (bias_ik - r_i)
    m_i: a running bound of max_k s_ik
    o_i = sum_k exp(s_ik - m_i) v_k,  l_i = sum_k exp(s_ik - m_i)
    result o / l,  lse = r + m + log l

Batch rows come as [G0, G1]: the G1 rows of one G0 share their bias (lines of a triangle
attention, samples of a diffusion step), and one program handles ROWS of them per bias tile it
loads; GROUP such programs run side by side (order.py). The dot's accumulator starts from the bias
(less r and m); r and m move only when weights grow past a limit, so that most blocks take no
maximum and rescale nothing; key blocks that a mask removes for all ROWS are not visited. exp2
throughout.

Biases may be any finite float32: those of a row are taken relative to its largest before they are
scaled, so that neither an offset that all keys share (-1e9 on a masked row) nor the largest float32
costs what q . k adds. |scale q . k| may go up to 2e38; see `carry.ABSORBED` for r beyond 2^53.

Source: FlashAttention-2 (Dao 2023), Algorithm 1; lazy rescaling as in FlashAttention-4; AlphaFold 3
supplement, Algorithms 14, 15 and 24.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from foldcp_kernels.attention.carry import ABSORBED, Carry
from foldcp_kernels.attention.order import place_program
from foldcp_kernels.core.triton_configs import Config, pick
from foldcp_kernels.core.triton_launch import capability, cdiv, launch, next_power_of_2
from foldcp_kernels.norm_linear.fused import exactness

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# r and m of a query that has seen no key: below any other, finite, so that no NaN arises.
LEAST = tl.constexpr(-3.4028234663852886e38)
NOTHING = tl.constexpr(-3e38)
_ABSORBED = tl.constexpr(ABSORBED)


@triton.jit
def takes_dots(b_r):
    """Return 1 where q . k counts beside biases of that size, 0 where float64 rounds it away."""
    return tl.where(tl.abs(b_r) <= _ABSORBED, 1.0, 0.0)


@triton.jit
def _load_bias(
    p_bias, s_key, o_k, m_i, keys, bound, BI: tl.constexpr, BK: tl.constexpr, TAIL: tl.constexpr
):
    """Biases [BI, BK] as they are, in float32; -inf past the last key."""
    if p_bias is not None:
        m_b = m_i[:, None]
        if TAIL:
            m_b = m_b & (o_k < bound)[None, :]
        b_b = tl.load(p_bias + o_k.to(tl.int64)[None, :] * s_key[2], mask=m_b, other=0.0)
        b_b = b_b.to(tl.float32)
    else:
        b_b = tl.zeros([BI, BK], tl.float32)
    if TAIL:
        b_b = tl.where((o_k < keys)[None, :], b_b, float("-inf"))
    return b_b


@triton.jit
def _relative(b_b, b_r, p_bias):
    """Biases less r, in log2 units."""
    if p_bias is not None:
        b_b = (b_b - b_r[:, None]) * LOG2E
    return b_b


@triton.jit
def _exact_step(
    qs, ks, keeps, b_b, p_bias, accs, b_r, ms, ls,
    EXACT: tl.constexpr, LAZY: tl.constexpr, ROWS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Weights of one key block for ROWS batch rows; r and m are the maxima so far.

    b_b: biases as they are. Accumulators are rescaled, the block is not yet added to them.
    """
    b_old, b_dots = b_r, ()
    if p_bias is not None and not LAZY:
        b_r = tl.maximum(b_r, tl.max(b_b, 1))
    for r in tl.static_range(ROWS):
        b_d = tl.dot(qs[r], tl.trans(ks[r]), input_precision=EXACT)  # [BI, BD] @ [BD, BK]
        b_dots = b_dots + (b_d,)
    if p_bias is not None and LAZY:
        # Written so that r lies in registers as dots do: as m, which the loop takes with it.
        b_top = tl.where(b_dots[0] == b_dots[0], b_b, float("-inf"))
        b_r = tl.maximum(b_r, tl.max(b_top, 1))
    b_b = _relative(b_b, b_r, p_bias)
    b_take, b_fall = takes_dots(b_r), (b_old - b_r) * LOG2E  # fall: what m loses as r rises
    new_accs, new_ms, new_ls, ps, sums = (), (), (), (), ()
    for r in tl.static_range(ROWS):
        b_s, b_m = b_b, ms[r]
        if KEEP:
            b_s = tl.where(keeps[r][None, :], b_s, float("-inf"))
        b_d = b_dots[r]
        if p_bias is not None:
            b_d, b_m = b_d * b_take[:, None], b_m + b_fall
        b_s += b_d
        b_new = tl.maximum(tl.maximum(tl.max(b_s, 1), b_m), NOTHING)
        b_scale = tl.exp2(b_m - b_new)
        b_p = tl.exp2(b_s - b_new[:, None])
        new_accs, new_ls = new_accs + (accs[r] * b_scale[:, None],), new_ls + (ls[r] * b_scale,)
        new_ms, ps, sums = new_ms + (b_new,), ps + (b_p,), sums + (tl.sum(b_p, 1),)
    return ps, sums, new_accs, b_r, new_ms, new_ls


@triton.jit
def _redo(b_r, m_i, p_bias):
    """Infinite where a query takes no dots, which only the exact step minds; else 0."""
    if p_bias is None:
        return tl.cast(0.0, tl.float32)
    return tl.max(tl.where(m_i & (tl.abs(b_r) > _ABSORBED), float("inf"), 0.0))


@triton.jit
def _visit(
    i_k, qs, accs, b_r, ms, ls, b_redo, pks, pvs, pkeeps, p_bias, s_key, m_i, keys, bound,
    D: tl.constexpr, BD: tl.constexpr, EXACT: tl.constexpr, LIMIT: tl.constexpr,
    LAZY: tl.constexpr, ROWS: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr,
    TAIL: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """One key block for ROWS batch rows; TAIL: it may pass the last key.

    LAZY: r and m are left where they are while sums of weights stay in LIMIT. The dot starts from
    bias - r - m, so that its result is the exponent: no maximum is taken and nothing is subtracted.
    Sums tell when r or m is too low; the block is then done again with its own maxima. b_redo is
    infinite where it must be: at the first block, and while a row takes no dots.
    """
    o_k, o_d = i_k * BK + tl.arange(0, BK), tl.arange(0, BD)
    o_k64, m_k = o_k.to(tl.int64), o_k < keys
    m_kd = (o_d < D)[None, :]
    if TAIL:
        m_kd = m_kd & m_k[:, None]
    b_b = _load_bias(p_bias, s_key, o_k, m_i, keys, bound, BI, BK, TAIL)
    ks, vs, keeps = (), (), ()
    for r in tl.static_range(ROWS):
        if KEEP:
            keeps = keeps + (tl.load(pkeeps[r] + o_k, mask=m_k, other=0) != 0,)
        b_k = tl.load(pks[r] + o_k64[:, None] * s_key[0] + o_d[None, :], mask=m_kd, other=0.0)
        b_v = tl.load(pvs[r] + o_k64[:, None] * s_key[1] + o_d[None, :], mask=m_kd, other=0.0)
        ks, vs = ks + (b_k,), vs + (b_v,)
    if LAZY:
        b_b = _relative(b_b, b_r, p_bias)
        ps, sums, b_worst = (), (), b_redo
        for r in tl.static_range(ROWS):
            b_s = b_b
            if KEEP:
                b_s = tl.where(keeps[r][None, :], b_s, float("-inf"))
            b_s = tl.dot(qs[r], tl.trans(ks[r]), b_s - ms[r][:, None], input_precision=EXACT)
            # [BI, BD] @ [BD, BK] -> [BI, BK]
            b_p = tl.exp2(b_s)
            b_sum = tl.sum(b_p, 1)
            ps, sums = ps + (b_p,), sums + (b_sum,)
            b_worst = tl.maximum(b_worst, tl.max(b_sum), propagate_nan=tl.PropagateNan.ALL)
        if not (b_worst <= LIMIT):
            # Loaded again: what only this seldom branch needs takes no registers outside of it.
            b_b = _load_bias(p_bias, s_key, o_k, m_i, keys, bound, BI, BK, TAIL)
            ps, sums, accs, b_r, ms, ls = _exact_step(
                qs, ks, keeps, b_b, p_bias, accs, b_r, ms, ls, EXACT, LAZY, ROWS, KEEP
            )
            b_redo = _redo(b_r, m_i, p_bias)
    else:
        ps, sums, accs, b_r, ms, ls = _exact_step(
            qs, ks, keeps, b_b, p_bias, accs, b_r, ms, ls, EXACT, LAZY, ROWS, KEEP
        )
    new_accs, new_ls = (), ()
    for r in tl.static_range(ROWS):
        b_p = ps[r].to(vs[r].dtype)
        b_acc = tl.dot(b_p, vs[r], accs[r], input_precision=EXACT)  # [BI, BK] @ [BK, BD]
        new_accs, new_ls = new_accs + (b_acc,), new_ls + (ls[r] + sums[r],)
    return new_accs, b_r, ms, new_ls, b_redo


@triton.jit
def _attention_kernel(
    p_q, p_k, p_v, p_bias, p_keep, p_live, p_count, p_o, p_r, p_m, p_l, p_out,
    s_q, s_k, s_v, s_bias, s_out, sizes, scale,
    D: tl.constexpr, BD: tl.constexpr, PRESCALED: tl.constexpr, FIRST: tl.constexpr,
    EVEN: tl.constexpr, EXACT: tl.constexpr, LIMIT: tl.constexpr, LAZY: tl.constexpr,
    ROWS: tl.constexpr, GROUP: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    rows, heads, queries, keys, bound = sizes
    groups = tl.cdiv(rows, ROWS)
    i_i, i_h, i_b, i_g = place_program(tl.program_id(0), tl.cdiv(queries, BI), heads, groups, GROUP)
    i_h, i_b, i_r = i_h.to(tl.int64), i_b.to(tl.int64), i_g * ROWS
    o_i = i_i * BI + tl.arange(0, BI)
    m_i = o_i < queries
    o_d = tl.arange(0, BD)
    m_q = m_i[:, None] & (o_d < D)[None, :]
    o_i64 = o_i.to(tl.int64)
    p_q += i_b * s_q[0] + i_h * s_q[2]
    p_k += i_b * s_k[0] + i_h * s_k[2]
    p_v += i_b * s_v[0] + i_h * s_v[2]
    qs, accs, ms, ls, lines = (), (), (), (), ()
    b_r = tl.full([BI], LEAST if p_bias is not None else 0.0, tl.float32)
    for r in tl.static_range(ROWS):
        # A row past the end repeats the last one; only its store is left out.
        i_line = tl.minimum(i_r + r, rows - 1).to(tl.int64)
        lines = lines + (i_line,)
        p_row = p_q + i_line * s_q[1] + o_i64[:, None] * s_q[3] + o_d[None, :]
        b_q = tl.load(p_row, mask=m_q, other=0.0)
        if not PRESCALED:
            b_q = (b_q.to(tl.float32) * (scale * LOG2E)).to(b_q.dtype)
        qs = qs + (b_q,)
        if FIRST:
            accs = accs + (tl.zeros([BI, BD], tl.float32),)
            ms = ms + (tl.full([BI], NOTHING, tl.float32),)
            ls = ls + (tl.zeros([BI], tl.float32),)
        else:
            o_c = ((i_b * rows + i_line) * heads + i_h) * queries + o_i64
            accs = accs + (tl.load(p_o + o_c[:, None] * D + o_d[None, :], mask=m_q, other=0.0),)
            b_r = tl.load(p_r + o_c, mask=m_i, other=0.0)  # the same for all ROWS
            ms = ms + (tl.load(p_m + o_c, mask=m_i, other=0.0) * LOG2E,)
            ls = ls + (tl.load(p_l + o_c, mask=m_i, other=0.0),)
    b_redo = tl.cast(float("inf"), tl.float32) if FIRST else _redo(b_r, m_i, p_bias)
    if p_bias is not None:
        p_bias += i_b * s_bias[0] + i_h * s_bias[1] + o_i64[:, None] * s_bias[2]
    pks, pvs, pkeeps = (), (), ()
    for r in tl.static_range(ROWS):
        pks, pvs = pks + (p_k + lines[r] * s_k[1],), pvs + (p_v + lines[r] * s_v[1],)
        if p_keep is not None:
            pkeeps = pkeeps + (p_keep + (i_b * rows + lines[r]) * keys,)
    s_key = (s_k[3], s_v[3], 0 if p_bias is None else s_bias[3])
    if p_live is None:
        # Only the last block has ends to mind: masks in the loop would cost a fifth of its time.
        for t in tl.range(0, keys // BK):
            accs, b_r, ms, ls, b_redo = _visit(
                t, qs, accs, b_r, ms, ls, b_redo, pks, pvs, pkeeps, p_bias, s_key, m_i, keys,
                bound, D, BD, EXACT, LIMIT, LAZY, ROWS, BI, BK, False, False,
            )  # fmt: skip
        if not EVEN:
            # A loop of one turn keeps its registers apart from those of the loop before.
            for t in tl.range(keys // BK, tl.cdiv(keys, BK), num_stages=1):
                accs, b_r, ms, ls, b_redo = _visit(
                    t, qs, accs, b_r, ms, ls, b_redo, pks, pvs, pkeeps, p_bias, s_key, m_i, keys,
                    bound, D, BD, EXACT, LIMIT, LAZY, ROWS, BI, BK, True, False,
                )  # fmt: skip
    else:
        i_live = i_b * groups + i_g
        p_order = p_live + i_live * tl.cdiv(keys, BK)
        for t in tl.range(0, tl.load(p_count + i_live)):
            accs, b_r, ms, ls, b_redo = _visit(
                tl.load(p_order + t), qs, accs, b_r, ms, ls, b_redo, pks, pvs, pkeeps, p_bias,
                s_key, m_i, keys, bound,
                D, BD, EXACT, LIMIT, LAZY, ROWS, BI, BK, not EVEN, True,
            )  # fmt: skip
    for r in tl.static_range(ROWS):
        m_r = m_i & (i_r + r < rows)
        o_c = ((i_b * rows + lines[r]) * heads + i_h) * queries + o_i64
        tl.store(p_r + o_c, b_r, mask=m_r)
        if p_out is None:
            p_row = p_o + o_c[:, None] * D + o_d[None, :]
            tl.store(p_row, accs[r], mask=m_q & m_r[:, None])
            tl.store(p_m + o_c, ms[r] * LN2, mask=m_r)
            tl.store(p_l + o_c, ls[r], mask=m_r)
        else:
            b_out = (accs[r] / ls[r][:, None]).to(p_out.dtype.element_ty)
            p_row = p_out + i_b * s_out[0] + lines[r] * s_out[1] + i_h * s_out[2]
            p_row = p_row + o_i64[:, None] * s_out[3] + o_d[None, :]
            tl.store(p_row, b_out, mask=m_q & m_r[:, None])
            tl.store(p_m + o_c, (ms[r] + tl.log2(ls[r])) * LN2, mask=m_r)


# Sums of weights below which m stays: what float16 weights can hold; else far from any overflow.
_LIMIT = {torch.float16: 2.0**14, torch.bfloat16: 2.0**40, torch.float32: 2.0**40}


def config_for(q: Tensor, masked: bool) -> Config:
    """Return the configuration for the shape of an attention.

    Args:
        q: [G0, G1, H, I, D].
        masked: keys are masked.
    """
    shape = ""
    if q.shape[3] <= 32:
        shape = "_window"
    elif masked:
        shape = "_masked"
    elif q.shape[1] == 1:
        shape = "_single"
    width = 32 if q.shape[-1] <= 32 else 64
    return pick(f"attention_{width}{shape}", q.element_size(), capability(q.device))


def live_blocks(keep: Tensor, rows: int, block: int) -> tuple[Tensor, Tensor]:
    """List the key blocks that some row of a program keeps.

    Args:
        keep: bool [G0, G1, K].
        rows: batch rows of one program.
        block: keys of a block.

    Returns:
        (indices of live blocks first, in order, int32 [G0 * groups, blocks]; their count, int32).
    """
    g0, g1, k = keep.shape
    padded = torch.nn.functional.pad(keep, (0, -k % block, 0, -g1 % rows))
    live = padded.view(g0, -(-g1 // rows), rows, -(-k // block), block).any(4).any(2).flatten(0, 1)
    order = torch.argsort(live.logical_not().to(torch.uint8), dim=1, stable=True)
    return order.int().contiguous(), live.sum(1, dtype=torch.int32)


def load_bound(bias: Tensor) -> int:
    """Return how far the rows of a bias may be read: to a multiple of 16, where storage allows.

    Loads are wide only when their bound is a multiple of 16; what lies past the keys is dropped.
    """
    keys = bias.shape[-1]
    bound = -(-keys // 16) * 16
    last = sum((n - 1) * s for n, s in zip(bias.shape[:-1], bias.stride()[:-1], strict=True))
    size = bias.untyped_storage().nbytes() // bias.element_size() - bias.storage_offset()
    return bound if bias.stride(-1) == 1 and last + bound <= size else keys


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    keep: Tensor | None = None,
    carry: Carry | None = None,
    last: bool = True,
    out: Tensor | None = None,
) -> Carry:
    """Attend to one panel of keys.

    Args:
        q: [G0, G1, H, I, D], last stride 1.
        k: [G0, G1, H, K, D], any strides; K >= 1, D <= 64.
        v: [G0, G1, H, K, D], any strides.
        bias: [G0, 1, H, I, K] with any strides (0 where it is shared), or None.
        scale: factor on q . k; log 2 says that q carries scale * log2(e) already.
        keep: keys, bool [G0, G1, K], True = keep; each row must keep one. None keeps all.
        carry: of the panels before, contiguous, one r a bias row; changed in place unless `last`.
        last: divide by l and return in the dtype of q.
        out: where to write the last result, [G0, G1, H, I, D] with last stride 1.

    Returns:
        The carry; after the last panel o is the result, r + m its lse and l None.

    Source: FlashAttention-2, Algorithm 1.
    """
    g0, g1, h, i, d = q.shape
    keys = k.shape[3]
    config = config_for(q, keep is not None)
    rows, block = config.blocks["ROWS"], config.blocks["BK"]
    live = count = None
    if keep is not None:
        keep = keep.contiguous()
        live, count = live_blocks(keep, rows, block)
        keep = keep.view(torch.uint8)
    if last and out is None:
        out = q.new_empty((g0, g1, i, h, d)).transpose(2, 3)
    o, r, m, length = carry if carry is not None else (None, None, None, None)
    if carry is None:
        r, m = q.new_empty((2, g0, g1, h, i), dtype=torch.float32)
        if not last:
            o = q.new_empty((g0, g1, h, i, d), dtype=torch.float32)
            length = torch.empty_like(m)
    bound = keys if bias is None else load_bound(bias)
    s_bias = None if bias is None else (bias.stride(0), *bias.stride()[2:])
    launch(
        _attention_kernel,
        (cdiv(i, config.blocks["BI"]) * h * cdiv(g1, rows) * g0,),
        q, k, v, bias, keep, live, count, o, r, m, length, out if last else None,
        q.stride()[:4], k.stride()[:4], v.stride()[:4], s_bias,
        out.stride()[:4] if last else None, (g1, h, i, keys, bound), float(scale),
        D=d, BD=max(16, next_power_of_2(d)), FIRST=carry is None,
        PRESCALED=math.isclose(scale, math.log(2), rel_tol=1e-12),
        EVEN=keys % block == 0, EXACT=exactness(q.dtype), LIMIT=_LIMIT[q.dtype],
        **config.options(),
    )  # fmt: skip
    return Carry(out, r, m, None) if last else Carry(o, r, m, length)


def flops(batch: int, heads: int, queries: int, keys: int, d: int) -> int:
    """Count the floating-point operations of the two matrix products.

    Args:
        batch: rows of the batch.
        heads: H.
        queries: I.
        keys: K.
        d: channels of a head.
    """
    return 4 * batch * heads * queries * keys * d


def exponentials(batch: int, heads: int, queries: int, keys: int) -> int:
    """Count the exponentials, which bound small head dims.

    Args:
        batch: rows of the batch.
        heads: H.
        queries: I.
        keys: K.
    """
    return batch * heads * queries * keys


def traffic(batch: int, shared: int, heads: int, queries: int, keys: int, d: int, size: int) -> int:
    """Count bytes of q, k, v, out and the bias, each moved once.

    Args:
        batch: rows of the batch.
        shared: rows of the batch that share one bias.
        heads: H.
        queries: I.
        keys: K.
        d: channels of a head.
        size: bytes of an element.
    """
    per_row = heads * d * (2 * queries + 2 * keys)
    return size * (batch * per_row + batch // shared * heads * queries * keys)
