"""Relative positions of pairs: a row of a table for each pair, added to the tile in one pass.

    out_ij += table[chains(i, j) * L + place(i, j)],   L = 4 r_max + 3

The row is computed in the kernel from integers per token, so no index matrix exists. The arithmetic
is that of `positions.table_index`, bit for bit: division rounded to nearest, halves rounded to
even, no fused multiply-add.

Source: AlphaFold 3 supplement, Algorithm 3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foldcp_kernels.core.triton_configs import pick
from foldcp_kernels.core.triton_launch import capability, cdiv, launch, next_power_of_2
from foldcp_kernels.relative_position.definition import Positions


@triton.jit
def _round_half_even(x):
    b_low = tl.floor(x)
    b_rest = x - b_low
    b_odd = b_low - 2.0 * tl.floor(b_low * 0.5)
    return b_low + tl.where((b_rest > 0.5) | ((b_rest == 0.5) & (b_odd != 0.0)), 1.0, 0.0)


@triton.jit
def _clamp(x, limit):
    return tl.minimum(tl.maximum(x, -limit), limit)


@triton.jit
def _relative_position_kernel(
    p_in, p_table, p_out, rows, cols, p_period, p_classes, s_in, s_out, sizes,
    R_MAX: tl.constexpr, S_MAX: tl.constexpr, FIX: tl.constexpr,
    C: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    lines, positions = sizes
    blocks = tl.cdiv(positions, BP)
    o_p = (tl.program_id(0) % blocks) * BP + tl.arange(0, BP)
    i_l = (tl.program_id(0) // blocks).to(tl.int64)
    i_b, i_i = i_l // lines, i_l % lines
    m_p = o_p < positions
    p_mine = p_classes + tl.load(rows[0] + i_i).to(tl.int64) * 3
    p_theirs = p_classes + tl.load(cols[0] + o_p, mask=m_p, other=0).to(tl.int64) * 3
    b_same = tl.load(p_theirs) == tl.load(p_mine)
    b_entity = tl.load(p_theirs + 1) == tl.load(p_mine + 1)
    b_copy = _clamp(tl.load(p_mine + 2) - tl.load(p_theirs + 2), S_MAX) + S_MAX
    b_none = b_same
    if FIX:
        b_none = b_entity == 0
    b_chains = tl.where(b_none, 2 * S_MAX + 1, b_copy)
    b_chains += tl.where(b_entity, 2 * S_MAX + 2, 0)

    b_offset = tl.load(rows[1] + i_i) - tl.load(cols[1] + o_p, mask=m_p, other=0)
    b_within = b_offset == 0
    if p_period is not None:
        b_period = tl.load(p_period + o_p, mask=m_p, other=1.0)
        b_wide = b_offset.to(tl.float32)
        b_wide -= b_period * _round_half_even(tl.div_rn(b_wide, b_period))
        b_offset = b_wide.to(tl.int32)
    b_token = tl.load(rows[2] + i_i) - tl.load(cols[2] + o_p, mask=m_p, other=0)
    b_place = tl.where(b_same, _clamp(b_offset, R_MAX) + R_MAX, 2 * R_MAX + 1)
    b_place = tl.where(b_within & b_same, _clamp(b_token, R_MAX) + 3 * R_MAX + 2, b_place)
    b_row = (b_chains * (4 * R_MAX + 3) + b_place).to(tl.int64)

    o_c = tl.arange(0, BC)
    m_x = m_p[:, None] & (o_c < C)[None, :]
    b_y = tl.load(p_table + b_row[:, None] * C + o_c[None, :], mask=m_x, other=0.0).to(tl.float32)
    o_p = o_p.to(tl.int64)
    if p_in is not None:
        p_x = p_in + i_b * s_in[0] + i_i * s_in[1] + o_p[:, None] * s_in[2]
        b_y += tl.load(p_x + o_c[None, :] * s_in[3], mask=m_x, other=0.0).to(tl.float32)
    p_y = p_out + i_b * s_out[0] + i_i * s_out[1] + o_p[:, None] * s_out[2]
    tl.store(p_y + o_c[None, :] * s_out[3], b_y.to(p_out.dtype.element_ty), mask=m_x)


def relative_position_fwd(
    x: Tensor | None,
    out: Tensor,
    table: Tensor,
    rows: tuple[Tensor, Tensor, Tensor],
    cols: tuple[Tensor, Tensor, Tensor],
    period: Tensor | None,
    classes: Tensor,
    r_max: int,
    s_max: int,
    fix_sym_check: bool,
) -> Tensor:
    """Write x + table row of each pair to `out`.

    Args:
        x: [B, R, T, C], any strides; may be `out`; None for the table rows alone.
        out: [B, R, T, C], any strides, written.
        table: [rows of the table, C], contiguous.
        rows: chain class, residue index and token index of the rows, int32 [R] each, contiguous.
        cols: of the columns, int32 [T] each.
        period: float32 [T] or None.
        classes: (asym, entity, sym) of each chain class, int32 [K, 3].
        r_max: largest residue offset that is distinguished.
        s_max: largest chain offset that is distinguished.
        fix_sym_check: see `Positions`.

    Returns:
        `out`.

    Source: AlphaFold 3 supplement, Algorithm 3.
    """
    b, r, t, c = out.shape
    bc = next_power_of_2(c)
    config = pick("relative_position", 2, capability(out.device))
    bp = max(1, config.blocks["BE"] // bc)
    s_in = None if x is None else x.stride()
    launch(
        _relative_position_kernel, (cdiv(t, bp) * r * b,),
        x, table, out, rows, cols, period, classes, s_in, out.stride(), (r, t),
        R_MAX=r_max, S_MAX=s_max, FIX=fix_sym_check, C=c, BC=bc, BP=bp,
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def relative_position(
    x: Tensor | None, out: Tensor | None, table: Tensor, positions: Positions
) -> Tensor:
    """Write x + table row of each pair to `out`.

    Args:
        x: [R, T, C] or [B, R, T, C], None for the table rows alone.
        out: like `x`, and may be `x`; None for a new tensor.
        table: [rows of the table, C].
        positions: of the pairs.

    Returns:
        `out`, or the new tensor.
    """
    rows, cols = positions.rows, positions.cols
    if out is None:
        shape = (len(rows.chain), len(cols.chain), table.shape[1])
        out = torch.empty_like(x) if x is not None else table.new_empty(shape)
    whole, source = out, x
    if out.dim() == 3:
        out, source = out[None], None if x is None else x[None]
    mine, theirs = (
        (s.chain.contiguous(), s.residue.contiguous(), s.token.contiguous()) for s in (rows, cols)
    )
    period = None if cols.period is None else cols.period.contiguous()
    relative_position_fwd(
        source, out, table.contiguous(), mine, theirs, period, positions.classes.contiguous(),
        positions.r_max, positions.s_max, positions.fix_sym_check,
    )  # fmt: skip
    return whole


def flops(b: int, r: int, t: int, c: int) -> int:
    """Count the additions of the look-up; the integers of a pair are few beside its channels.

    Args:
        b: batch.
        r: rows of the tile.
        t: columns of the tile.
        c: channels.
    """
    return b * r * t * c


def traffic(b: int, r: int, t: int, c: int, element_bytes: int, added: bool = True) -> int:
    """Count bytes read and written in device memory; the table stays in the L2 cache.

    Args:
        b: batch.
        r: rows of the tile.
        t: columns of the tile.
        c: channels.
        element_bytes: of an element.
        added: the tile is read, too.
    """
    return b * r * t * c * element_bytes * (2 if added else 1)
