"""Relative positions of token pairs as rows of a table, added to a tile.

    out_ij += table[chains(i, j) * L + place(i, j)],   L = 4 r_max + 3

`chains` tells apart the offsets of chain copies and whether the entities are the same; `place` is
the residue offset (0 .. 2 r_max), another chain (2 r_max + 1), or the token offset within one
residue of one chain (the rest).

Source: AlphaFold 3 supplement, Algorithm 3.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from foldcp_kernels.core.arguments import check
from foldcp_kernels.core.chunking import chunk_length, spans
from foldcp_kernels.core.dispatch import check_dtype
from foldcp_kernels.core.op import Op
from foldcp_kernels.relative_position import definition
from foldcp_kernels.relative_position.definition import Positions as Positions
from foldcp_kernels.relative_position.definition import Tokens as Tokens
from foldcp_kernels.relative_position.positions import table_index

MAX_CHANNELS = 1024
_INDEX_BYTES = 40  # of the integers of a pair while its index is computed


def add_rows_of_table_(out: Tensor, table: Tensor, index: Tensor) -> None:
    """Add to each pair the row of a table that its index selects, in place, without gradient.

    Args:
        out: [rows, cols, C], changed.
        table: [K, C].
        index: int32 or int64 [rows, cols].
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
    """Add the table row of each pair to `out`.

    Args:
        out: [R, T, C] or [B, R, T, C].
        table: [table_rows, C].
        positions: of these rows and columns.
        impl: see `foldcp_kernels.core.dispatch`.

    Returns:
        `out`, changed in place, when gradients are off; else a new tensor.

    Raises:
        ValueError: a shape or dtype that does not fit, or a named `impl` cannot run.

    Source: AlphaFold 3 supplement, Algorithm 3.
    """
    _check(table, positions, out)
    chosen = _RELATIVE_POSITION.choose(out, table, positions, impl=impl)
    return _RELATIVE_POSITION.run(chosen, out, table, positions)


def relative_position(table: Tensor, positions: Positions, impl: str | None = None) -> Tensor:
    """Look up the table row of each pair.

    Args:
        table: [table_rows, C].
        positions: of the pairs.
        impl: see `foldcp_kernels.core.dispatch`.

    Returns:
        [R, T, C] in the dtype of `table`.

    Raises:
        ValueError: a shape or dtype that does not fit, or a named `impl` cannot run.

    Source: AlphaFold 3 supplement, Algorithm 3.
    """
    _check(table, positions, None)
    chosen = _RELATIVE_POSITION.choose(table, table, positions, impl=impl)
    return _RELATIVE_POSITION.run(chosen, None, table, positions)


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


def _looked_up(
    write: Callable[..., Tensor], x: Tensor | None, table: Tensor, positions: Positions
) -> Tensor:
    """x (None: nothing) + table rows, in place when gradients are off."""
    if torch.is_grad_enabled():
        return _LookUp.apply(x, table, positions, write)
    return write(x, x, table, positions)


def _defined(x: Tensor | None, table: Tensor, positions: Positions) -> Tensor:
    found = definition.relative_position(table, positions)
    if x is None:
        return found
    return x + found if torch.is_grad_enabled() else x.add_(found)


def _write(x: Tensor | None, out: Tensor | None, table: Tensor, positions: Positions) -> Tensor:
    """x (None: nothing) + table rows, written to `out` (None: new; may be `x`)."""
    if x is None:
        shape = (len(positions.rows.chain), len(positions.cols.chain), table.shape[1])
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
        ctx: Any,
        x: Tensor | None,
        table: Tensor,
        positions: Positions,
        write: Callable[..., Tensor],
    ) -> Tensor:
        ctx.positions, ctx.table = positions, (table.shape, table.dtype)
        return write(x, None, table, positions)

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


def _fused() -> Callable[..., Tensor]:
    from foldcp_kernels.relative_position.fused import relative_position

    return partial(_looked_up, relative_position)


_RELATIVE_POSITION = Op(
    "relative_position",
    eager=partial(_looked_up, _write),
    triton=_fused,
    covers=_refusal,
    definition=_defined,
    own_backward=True,
)
