"""Describe where tokens are, and compute the row of the table that each pair takes."""

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


def table_index(p: Positions) -> Tensor:
    """Compute the table row of every pair, int32 [R, T].

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
