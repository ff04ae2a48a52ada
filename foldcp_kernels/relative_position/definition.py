"""Describe where tokens are, and define the embedding of their relative positions in torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """Integers of the tokens along one side of a tile, int32 [T] each.

    Args:
        chain: row of `Positions.classes`.
        residue: index of the residue.
        token: index of the token.
        period: of cyclic chains, floating point [T]; None when no chain is cyclic.
    """

    chain: Tensor
    residue: Tensor
    token: Tensor
    period: Tensor | None = None


@dataclass(frozen=True)
class Positions:
    """Positions that select the table row of each pair of a tile.

    Args:
        rows: tokens of the rows.
        cols: tokens of the columns; the period is theirs.
        classes: (asym, entity, sym) of each chain class, int32 [K, 3].
        r_max: largest residue or token offset that is distinguished.
        s_max: largest offset of chain copies that is distinguished.
        fix_sym_check: chains of other entities have no chain offset; otherwise the same chain has
            none, as Boltz-1 was trained.
    """

    rows: Tokens
    cols: Tokens
    classes: Tensor
    r_max: int
    s_max: int
    fix_sym_check: bool

    def cut(self, lo: int, hi: int) -> Positions:
        """Cut out rows lo:hi of the tile.

        Args:
            lo: first row.
            hi: end of the rows, exclusive.
        """
        r = self.rows
        period = None if r.period is None else r.period[lo:hi]
        rows = Tokens(r.chain[lo:hi], r.residue[lo:hi], r.token[lo:hi], period)
        return replace(self, rows=rows)

    @property
    def table_rows(self) -> int:
        """Rows of the table: (offsets of chain copies and none) x 2 x places."""
        return 2 * (2 * self.s_max + 2) * (4 * self.r_max + 3)


def relative_position(table: Tensor, p: Positions) -> Tensor:
    """Look up the table row of each pair.

    Args:
        table: [rows of the table, C]; its rows are those of the same entity (no, yes), in each
            those of the offset between chain copies (-s_max .. s_max, none), and in each those of
            the place: residue offset (-r_max .. r_max), another chain, token offset (alike).
        p: positions of the pairs.

    Returns:
        The encoding [R, T, C].

    Source: AlphaFold 3, Algorithm 3.
    """
    r_max, s_max = p.r_max, p.s_max

    def difference(mine: Tensor, theirs: Tensor) -> Tensor:
        return mine.long()[:, None] - theirs.long()[None, :]

    rows, cols = (p.classes[side.chain.long()] for side in (p.rows, p.cols))  # asym, entity, sym
    chain, entity, copy = (difference(rows[:, i], cols[:, i]) for i in range(3))
    residue = difference(p.rows.residue, p.cols.residue)
    token = difference(p.rows.token, p.cols.token).clip(-r_max, r_max) + r_max
    around = residue
    if p.cols.period is not None:
        turns = torch.round(residue.double() / p.cols.period.double())
        around = (residue - turns * p.cols.period.double()).long()
    place = around.clip(-r_max, r_max) + r_max
    place = torch.where(residue == 0, 2 * r_max + 2 + token, place)
    place = torch.where(chain == 0, place, 2 * r_max + 1)
    has_offset = entity == 0 if p.fix_sym_check else chain != 0
    offset = torch.where(has_offset, copy.clip(-s_max, s_max) + s_max, 2 * s_max + 1)
    rows_of = table.view(2, 2 * s_max + 2, 4 * r_max + 3, -1)
    return rows_of[(entity == 0).long(), offset, place]
