"""Attention with an additive bias: softmax over key blocks, carried over panels of keys.

    s_ik = scale q_i . k_k + bias_ik;  m_i: a running bound of max_k s_ik
    o_i = sum_k exp(s_ik - m_i) v_k,  l_i = sum_k exp(s_ik - m_i)
    result o / l,  lse = m + log l

Batch rows come as [G0, G1]: the G1 rows of one G0 share their bias (lines of a triangle
attention, samples of a diffusion step), and one program handles ROWS of them per bias tile it
loads. The dot's accumulator starts from the bias; m moves only when a block exceeds it by more
than 2^8, so that most blocks rescale nothing; key blocks that a mask removes for all ROWS are not
visited. exp2 throughout.

Source: FlashAttention-2 (Dao 2023), Algorithm 1; lazy rescaling as in FlashAttention-4; AlphaFold 3
supplement, Algorithms 14, 15 and 24.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from foldcp_kernels.carry import Carry
from foldcp_kernels.fused.configs import Config, pick
from foldcp_kernels.fused.launch import capability, launch
from foldcp_kernels.fused.norm_linear import exactness

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NOTHING = tl.constexpr(-1e30)  # m of a query that has seen no key: finite, so that no NaN arises
SLACK = tl.constexpr(8.0)  # powers of two that a block may exceed m by


@triton.jit
def _accumulate(b_q, b_k, b_v, b_s, b_acc, b_m, b_l, LAZY: tl.constexpr, EXACT: tl.constexpr):
    """One key block for one batch row; b_s holds the bias in log2 units."""
    b_s = tl.dot(b_q, tl.trans(b_k), b_s, input_precision=EXACT)  # [BI, BD] @ [BD, BK] -> [BI, BK]
    b_top = tl.max(b_s, 1)
    if LAZY:
        b_new = tl.where(b_top > b_m + SLACK, b_top, b_m)
        if tl.max((b_new > b_m).to(tl.int32)) > 0:
            b_scale = tl.exp2(b_m - b_new)
            b_acc *= b_scale[:, None]
            b_l *= b_scale
            b_m = b_new
    else:
        b_new = tl.maximum(b_top, b_m)
        b_scale = tl.exp2(b_m - b_new)
        b_acc *= b_scale[:, None]
        b_l *= b_scale
        b_m = b_new
    b_p = tl.exp2(b_s - b_m[:, None])
    b_l += tl.sum(b_p, 1)
    b_p = b_p.to(b_v.dtype)
    b_acc = tl.dot(b_p, b_v, b_acc, input_precision=EXACT)  # [BI, BK] @ [BK, BD] -> [BI, BD]
    return b_acc, b_m, b_l


@triton.jit
def _attention_kernel(
    p_q, p_k, p_v, p_bias, p_keep, p_live, p_count, p_o, p_m, p_l, p_out,
    s_q, s_k, s_v, s_bias, s_out, sizes, scale,
    D: tl.constexpr, BD: tl.constexpr, PRESCALED: tl.constexpr, FIRST: tl.constexpr,
    EVEN: tl.constexpr, EXACT: tl.constexpr, LAZY: tl.constexpr,
    ROWS: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    rows, heads, queries, keys, bound = sizes
    i_blocks, groups = tl.cdiv(queries, BI), tl.cdiv(rows, ROWS)
    i_i = tl.program_id(0) % i_blocks
    rest = tl.program_id(0) // i_blocks
    i_h = (rest % heads).to(tl.int64)
    i_g = rest // heads
    i_b, i_r = (i_g // groups).to(tl.int64), (i_g % groups).to(tl.int64) * ROWS
    o_i = i_i * BI + tl.arange(0, BI)
    m_i = o_i < queries
    o_d = tl.arange(0, BD)
    m_q = m_i[:, None] & (o_d < D)[None, :]
    o_i64 = o_i.to(tl.int64)
    p_q += i_b * s_q[0] + i_h * s_q[2]
    p_k += i_b * s_k[0] + i_h * s_k[2]
    p_v += i_b * s_v[0] + i_h * s_v[2]
    qs, accs, ms, ls, lines = (), (), (), (), ()
    for r in tl.static_range(ROWS):
        # A row past the end repeats the last one; only its store is left out.
        i_line = tl.minimum(i_r + r, rows - 1)
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
            ms = ms + (tl.load(p_m + o_c, mask=m_i, other=0.0) * LOG2E,)
            ls = ls + (tl.load(p_l + o_c, mask=m_i, other=0.0),)
    if p_bias is not None:
        p_bias += i_b * s_bias[0] + i_h * s_bias[1] + o_i64[:, None] * s_bias[2]
    k_blocks = tl.cdiv(keys, BK)
    visits = k_blocks
    if p_live is not None:
        visits = tl.load(p_count + i_g)
    for t in tl.range(0, visits):
        i_k = t
        if p_live is not None:
            i_k = tl.load(p_live + i_g.to(tl.int64) * k_blocks + t)
        o_k = i_k * BK + tl.arange(0, BK)
        o_k64 = o_k.to(tl.int64)
        m_k = o_k < keys
        if p_bias is not None:
            p_tile = p_bias + o_k64[None, :] * s_bias[3]
            if EVEN:
                b_b = tl.load(p_tile, mask=m_i[:, None], other=0.0)
            else:
                b_b = tl.load(p_tile, mask=m_i[:, None] & (o_k < bound)[None, :], other=0.0)
            b_b = b_b.to(tl.float32) * LOG2E
        else:
            b_b = tl.zeros([BI, BK], tl.float32)
        if not EVEN:
            b_b = tl.where(m_k[None, :], b_b, float("-inf"))
        next_accs, next_ms, next_ls = (), (), ()
        for r in tl.static_range(ROWS):
            b_s = b_b
            if p_keep is not None:
                b_keep = tl.load(p_keep + (i_b * rows + lines[r]) * keys + o_k, mask=m_k, other=0)
                b_s = tl.where((b_keep != 0)[None, :], b_s, float("-inf"))
            m_kd = m_k[:, None] & (o_d < D)[None, :]
            p_keys = p_k + lines[r] * s_k[1] + o_k64[:, None] * s_k[3] + o_d[None, :]
            b_k = tl.load(p_keys, mask=m_kd, other=0.0)
            p_values = p_v + lines[r] * s_v[1] + o_k64[:, None] * s_v[3] + o_d[None, :]
            b_v = tl.load(p_values, mask=m_kd, other=0.0)
            b_acc, b_m, b_l = _accumulate(
                qs[r], b_k, b_v, b_s, accs[r], ms[r], ls[r], LAZY, EXACT
            )  # fmt: skip
            next_accs = next_accs + (b_acc,)
            next_ms = next_ms + (b_m,)
            next_ls = next_ls + (b_l,)
        accs, ms, ls = next_accs, next_ms, next_ls
    for r in tl.static_range(ROWS):
        m_r = m_i & (i_r + r < rows)
        o_c = ((i_b * rows + lines[r]) * heads + i_h) * queries + o_i64
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


def config_for(q: Tensor, masked: bool) -> Config:
    """The configuration for the shape of an attention; q [G0, G1, H, I, D]."""
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
    """Key blocks that some row of a program keeps.

    Args:
        keep: bool [G0, G1, K]. rows: batch rows of one program. block: keys of a block.

    Returns:
        (indices of live blocks first, in order, int32 [G0 * groups, blocks]; their count, int32).
    """
    g0, g1, k = keep.shape
    padded = torch.nn.functional.pad(keep, (0, -k % block, 0, -g1 % rows))
    live = padded.view(g0, -(-g1 // rows), rows, -(-k // block), block).any(4).any(2).flatten(0, 1)
    order = torch.argsort(live.logical_not().to(torch.uint8), dim=1, stable=True)
    return order.int().contiguous(), live.sum(1, dtype=torch.int32)


def load_bound(bias: Tensor) -> int:
    """How far the rows of a bias may be read: to a multiple of 16, where its storage allows.

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
        q: [G0, G1, H, I, D], last stride 1; k, v: [G0, G1, H, K, D] likewise, K >= 1; D <= 64.
        bias: [G0, 1, H, I, K] with any strides (0 where it is shared), or None.
        scale: factor on q . k; log 2 says that q carries scale * log2(e) already.
        keep: keys, bool [G0, G1, K], True = keep; each row must keep one. None keeps all.
        carry: of the panels before, contiguous; changed in place unless `last`.
        last: divide by l and return in the dtype of q.
        out: where to write the last result, [G0, G1, H, I, D] with last stride 1.

    Returns:
        Carry (o, m, l); after the last panel o is the result, m its lse and l is 1 by definition
        (returned as None).

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
    o, m, length = carry if carry is not None else (None, None, None)
    if carry is None:
        m = q.new_empty((g0, g1, h, i), dtype=torch.float32)
        if not last:
            o = q.new_empty((g0, g1, h, i, d), dtype=torch.float32)
            length = torch.empty_like(m)
    bound = keys if bias is None else load_bound(bias)
    s_bias = None
    if bias is not None:
        s_bias = (bias.stride(0), *bias.stride()[2:])
    launch(
        _attention_kernel,
        (triton.cdiv(i, config.blocks["BI"]) * h * triton.cdiv(g1, rows) * g0,),
        q, k, v, bias, keep, live, count, o, m, length, out if last else None,
        q.stride()[:4], k.stride()[:4], v.stride()[:4], s_bias,
        out.stride()[:4] if last else None, (g1, h, i, keys, bound), float(scale),
        D=d, BD=max(16, triton.next_power_of_2(d)), FIRST=carry is None,
        PRESCALED=math.isclose(scale, math.log(2), rel_tol=1e-12),
        EVEN=keys % block == 0, EXACT=exactness(q.dtype), **config.options(),
    )  # fmt: skip
    return Carry(out, m, None) if last else Carry(o, m, length)


def flops(batch: int, heads: int, queries: int, keys: int, d: int) -> int:
    """Floating-point operations of the two matrix products."""
    return 4 * batch * heads * queries * keys * d


def exponentials(batch: int, heads: int, queries: int, keys: int) -> int:
    """How many exponentials are computed: what bounds small head dims."""
    return batch * heads * queries * keys


def traffic(batch: int, shared: int, heads: int, queries: int, keys: int, d: int, size: int) -> int:
    """Bytes of q, k, v, out and the bias, each moved once; `shared` batch rows share one bias."""
    per_row = heads * d * (2 * queries + 2 * keys)
    return size * (batch * per_row + batch // shared * heads * queries * keys)
