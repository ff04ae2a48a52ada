"""Relative positions of token pairs as rows of a table, added to a tile.

    out_ij += table[chains(i, j) * L + place(i, j)],   L = 4 r_max + 3

`chains` tells apart the offsets of chain copies and whether the entities are the same; `place` is
the residue offset (0 .. 2 r_max), another chain (2 r_max + 1), or the token offset within one
residue of one chain (the rest).

Source: AlphaFold 3 supplement, Algorithm 3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from foldcp_kernels.arguments import check
from foldcp_kernels.chunking import chunk_length, spans
from foldcp_kernels.dispatch import check_dtype, choose

MAX_CHANNELS = 1024
_INDEX_BYTES = 40  # of the integers of a pair while its index is computed


@dataclass(frozen=True)
class Tokens:
    """Integers of the tokens along one side of a tile, int32 [T] each.

    Args:
        chain: row of `Positions.classes`. residue, token: indices of the residue and the token.
        period: of cyclic chains, floating point [T]; None when no chain is cyclic.
    """

    chain: Tensor
    residue: Tensor
    token: Tensor
    period: Tensor | None = None


@dataclass(frozen=True)
class Positions:
    """What decides the table row of each pair of a tile.

    Args:
        rows, cols: the tokens of both sides; the period is that of the columns.
        classes: (asym, entity, sym) of each chain class, int32 [K, 3].
        r_max: largest residue or token offset told apart. s_max: likewise of chain copies.
        fix_sym_check: chains of other entities have no chain offset; otherwise the same chain
            has none, as Boltz-1 was trained.
    """

    rows: Tokens
    cols: Tokens
    classes: Tensor
    r_max: int
    s_max: int
    fix_sym_check: bool

    def cut(self, lo: int, hi: int) -> Positions:
        """The same for rows lo:hi of the tile."""
        r = self.rows
        period = None if r.period is None else r.period[lo:hi]
        rows = Tokens(r.chain[lo:hi], r.residue[lo:hi], r.token[lo:hi], period)
        return replace(self, rows=rows)

    @property
    def table_rows(self) -> int:
        """Rows of the table: (offsets of chain copies and none) x 2 x places."""
        return 2 * (2 * self.s_max + 2) * (4 * self.r_max + 3)


def table_index(p: Positions) -> Tensor:
    """The table row of every pair, int32 [R, T].

    Source: AlphaFold 3 supplement, Algorithm 3.
    """
    rows, cols, r_max = p.rows, p.cols, p.r_max
    base, same = _chains(p)
    offset = rows.residue[:, None] - cols.residue
    in_residue = offset == 0
    if cols.period is not None:
        offset = (offset - cols.period * torch.round(offset / cols.period)).int()
    place = offset.clamp_(-r_max, r_max).add_(r_max)
    place = torch.where(same, place, 2 * r_max + 1)
    # Both on one residue of one chain: atoms of a ligand or a modified residue.
    within = (rows.token[:, None] - cols.token).clamp_(-r_max, r_max)
    place = torch.where(in_residue & same, within.add_(3 * r_max + 2), place)
    return place.add_(base)


def _chains(p: Positions) -> tuple[Tensor, Tensor]:
    """(first table row, same chain) of each pair [R, T], through the K kinds of chains."""
    mine, theirs = p.classes[p.rows.chain.long()], p.classes  # [R, 3], [K, 3]
    same_chain, same_entity = (mine[:, None, i] == theirs[:, i] for i in (0, 1))  # [R, K]
    offset = (mine[:, None, 2] - theirs[:, 2]).clamp_(-p.s_max, p.s_max)
    none = ~same_entity if p.fix_sym_check else same_chain
    chains = torch.where(none, 2 * p.s_max + 1, offset.add_(p.s_max))
    chains = chains + same_entity.int() * (2 * p.s_max + 2)
    base = chains * (4 * p.r_max + 3)
    return base.index_select(1, p.cols.chain), same_chain.index_select(1, p.cols.chain)


def add_rows_of_table_(out: Tensor, table: Tensor, index: Tensor) -> None:
    """Add to each pair the row of a table that its index selects, in place, without gradient.

    Args:
        out: [rows, cols, C], changed. table: [K, C]. index: int32 or int64 [rows, cols].
    """
    rows, cols, channels = out.shape
    # Looked-up rows are read back at once: an eighth of a chunk stays in the caches.
    step = chunk_length(rows, 8 * cols * channels * table.element_size(), out.device)
    buffer = table.new_empty((step * cols, channels))
    for lo, hi in spans(rows, step):
        part = buffer[: (hi - lo) * cols]
        torch.index_select(table, 0, index[lo:hi].flatten(), out=part)
        out[lo:hi].add_(part.view(hi - lo, cols, channels))


def add_relative_position(
    out: Tensor, table: Tensor, positions: Positions, impl: str | None = None
) -> Tensor:
    """out + the table row of each pair.

    Args:
        out: [R, T, C] or [B, R, T, C]. table: [table_rows, C].
        positions: of these rows and columns. impl: see `foldcp_kernels.dispatch`.

    Returns:
        `out`, changed in place, when gradients are off; else a new tensor.

    Raises:
        ValueError: a shape or dtype that does not fit, or a named `impl` cannot run.

    Source: AlphaFold 3 supplement, Algorithm 3.
    """
    _check(table, positions, out)
    name = choose("relative_position", impl, out, _refusal(out, table, positions))
    if torch.is_grad_enabled():
        return _LookUp.apply(out, table, positions, name)
    return _write(out, out, table, positions, name)


def relative_position(table: Tensor, positions: Positions, impl: str | None = None) -> Tensor:
    """The table row of each pair.

    Args:
        table: [table_rows, C]. positions: of the pairs. impl: see `foldcp_kernels.dispatch`.

    Returns:
        [R, T, C] in the dtype of `table`.

    Raises:
        ValueError: a shape or dtype that does not fit, or a named `impl` cannot run.

    Source: AlphaFold 3 supplement, Algorithm 3.
    """
    _check(table, positions, None)
    name = choose("relative_position", impl, table, _refusal(table, table, positions))
    if torch.is_grad_enabled():
        return _LookUp.apply(None, table, positions, name)
    return _write(None, None, table, positions, name)


def _check(table: Tensor, p: Positions, out: Tensor | None) -> None:
    op = "relative_position" if out is None or out.dim() == 3 else "relative_position 4"
    sides = (*vars(p.rows).values(), *vars(p.cols).values())
    check(op, table, *sides, p.classes, out, K=p.table_rows)


def _refusal(out: Tensor, table: Tensor, positions: Positions) -> str | None:
    if table.shape[1] > MAX_CHANNELS:
        return f"`table` has {table.shape[1]} channels; expected at most {MAX_CHANNELS}"
    period = positions.cols.period
    if period is not None and period.dtype != torch.float32:
        return f"`positions.cols.period` has dtype {period.dtype}; expected float32"
    return check_dtype(out, "out") or check_dtype(table, "table")


def _write(
    x: Tensor | None, out: Tensor | None, table: Tensor, positions: Positions, name: str
) -> Tensor:
    """x (None: nothing) + table rows, written to `out` (None: new; may be `x`)."""
    rows, cols = positions.rows, positions.cols
    shape = (len(rows.chain), len(cols.chain), table.shape[1])
    if name == "triton":
        from foldcp_kernels.fused.relative_position import relative_position_fwd

        if out is None:
            out = torch.empty_like(x) if x is not None else table.new_empty(shape)
        whole, source = out, x
        if out.dim() == 3:
            out, source = out[None], None if x is None else x[None]
        sides = (tuple(y.contiguous() for y in (s.chain, s.residue, s.token)) for s in (rows, cols))
        period = None if cols.period is None else cols.period.contiguous()
        relative_position_fwd(
            source, out, table.contiguous(), *sides, period, positions.classes.contiguous(),
            positions.r_max, positions.s_max, positions.fix_sym_check,
        )  # fmt: skip
        return whole
    if name == "reference":
        from foldcp_kernels import reference

        found = reference.relative_position(table, positions)
        if x is None:
            return found
        return x.add_(found) if out is x else x + found
    if x is None:
        return table.index_select(0, table_index(positions).flatten()).view(shape)
    out = x if out is x else x.clone()
    for lo, hi in _parts(positions, out.device):
        index = table_index(positions.cut(lo, hi))
        for tile in out[None] if out.dim() == 3 else out:
            add_rows_of_table_(tile[lo:hi], table, index)
    return out


def _parts(positions: Positions, device: torch.device) -> Any:
    rows, cols = len(positions.rows.chain), len(positions.cols.chain)
    return spans(rows, chunk_length(rows, max(1, cols * _INDEX_BYTES), device))


class _LookUp(torch.autograd.Function):
    """Gradients are added up per table row, a chunk of pairs at a time."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor | None, table: Tensor, positions: Positions, name: str
    ) -> Tensor:
        ctx.positions, ctx.table = positions, (table.shape, table.dtype)
        return _write(x, None, table, positions, name)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        dtable = None
        if ctx.needs_input_grad[1]:
            shape, dtype = ctx.table
            wide = torch.promote_types(dtype, torch.float32)
            dtable = dout.new_zeros(shape, dtype=wide)
            rows, cols, channels = dout.shape[-3:]
            each = 2 * cols * channels * dtable.element_size()
            for lo, hi in spans(rows, chunk_length(rows, each, dout.device)):
                index = table_index(ctx.positions.cut(lo, hi)).flatten()
                for tile in dout[None] if dout.dim() == 3 else dout:
                    dtable.index_add_(0, index, tile[lo:hi].flatten(0, 1).to(wide))
            dtable = dtable.to(dtype)
        return dout if ctx.needs_input_grad[0] else None, dtable, None, None
