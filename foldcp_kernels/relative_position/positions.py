"""Compute the row of the table that each pair takes."""

from __future__ import annotations

import torch
from torch import Tensor

from foldcp_kernels.relative_position.definition import Positions


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
