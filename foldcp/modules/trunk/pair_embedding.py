"""Relative positions, bonds and contact constraints of a tile: table look-ups and sparse lists.

Stock multiplies one-hot vectors with a Linear. Here one integer per token pair selects a row of
a table that already holds the sum of the Linear's columns, so nothing wider than the tile exists.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from math import pi
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foldcp.fabric.mesh import Mesh
from foldcp.layout.tiles import PairLayout, Span
from foldcp.modules.base import TiledModule
from foldcp_kernels.relative_position import (
    Positions,
    Tokens,
    add_relative_position,
    relative_position,
)

Feats = Mapping[str, Tensor]

_NO_PERIOD = 10000.0  # what stock divides by for the other chains once one chain is cyclic
_FIRST_CONTACT = 2  # contact types 0 and 1 say that nothing is known about the pair


def _unchanged(held: tuple[Any, ...], key: tuple[Any, ...]) -> bool:
    """Tell whether a cached result belongs to this layout and to these very tensors."""
    return held[0] == key[0] and all(a is b for a, b in zip(held[1:], key[1:], strict=True))


def _padded(x: Tensor, layout: PairLayout) -> Tensor:
    """[1, N] -> [padded]; padding repeats zeros."""
    return F.pad(x[0], (0, layout.padded - layout.n))


@dataclass(frozen=True)
class RelativePositionOptions:
    """Say how relative positions are counted.

    Attributes:
        r_max: largest offset of residues and tokens that has a class of its own.
        s_max: largest offset of copies of a chain that has one.
        entities_only: copies are compared between chains of one entity; else between any two.
        cyclic: offsets within a cyclic chain go the short way round.
    """

    r_max: int
    s_max: int
    entities_only: bool
    cyclic: bool


class RelativePositionEncoder(TiledModule):
    """Relative position encoding of a tile. AlphaFold 3, Algorithm 3.

    Args:
        twin: Boltz's RelativePositionEncoder.
        mesh: the mesh.
        options: how positions are counted.
    """

    def __init__(self, twin: nn.Module, mesh: Mesh, options: RelativePositionOptions) -> None:
        super().__init__(twin, mesh)
        self.options = options
        self._prepared: tuple[tuple[Any, ...], Positions] | None = None

    def rows(self, feats: Feats, layout: PairLayout, lo: int, hi: int) -> Tensor:
        """Encode the relative positions of tile rows lo:hi.

        Args:
            feats: collated compact features.
            layout: the tiling.
            lo: first row of the tile.
            hi: end of the rows, exclusive.

        Returns:
            [1, hi - lo, T_c, C] in the dtype of the weights; padding pairs hold finite values.

        Source: AlphaFold 3 supplement, Algorithm 3.
        """
        return relative_position(self.table(), self.positions(feats, layout).cut(lo, hi))[None]

    def table(self) -> Tensor:
        """Sum the Linear's columns into a table [12 * L, C] with L = 4 * r_max + 3.

        Row `chains * L + place`. `place` is the residue offset (0 .. 2 r_max), another chain
        (2 r_max + 1), or a token offset within one residue (the rest): the residue offset is then
        zero, so the pair of both offsets needs no table of its own. `chains` is the chain offset
        (6 values), plus 6 where the entities are the same.
        """
        width = 2 * self.options.r_max + 2
        w = self.linear_layer.weight.T  # [features, C]
        residue, token = w[:width], w[width : 2 * width]
        entity, chain = w[2 * width], w[2 * width + 1 :]
        place = torch.cat([residue + token[-1], residue[self.options.r_max] + token[:-1]])  # [L, C]
        chains = torch.cat([chain, chain + entity])  # [12, C]
        return (chains[:, None] + place).flatten(0, 1)

    def positions(self, feats: Feats, layout: PairLayout) -> Positions:
        """Return the positions that select each pair's table row; kept for the next row chunk.

        Args:
            feats: collated compact features.
            layout: the tiling.
        """
        names = ("asym_id", "entity_id", "sym_id", "residue_index", "token_index", "cyclic_period")
        key = (layout, *(feats[k] for k in names))
        held = self._prepared
        if held is None or not _unchanged(held[0], key):
            self._prepared = held = (key, self._positions(feats, layout))
        return held[1]

    def _positions(self, feats: Feats, layout: PairLayout) -> Positions:
        ids = torch.stack([_padded(feats[k], layout) for k in ("asym_id", "entity_id", "sym_id")])
        classes, chain = torch.unique(ids, dim=1, return_inverse=True)
        period = None
        if self.options.cyclic and bool((feats["cyclic_period"] > 0).any()):
            period = _padded(feats["cyclic_period"], layout)
            period = torch.where(period > 0, period, torch.full_like(period, _NO_PERIOD))
        # int32 halves the traffic of the per-pair integer arithmetic.
        numbers = (_padded(feats[k], layout).int() for k in ("residue_index", "token_index"))
        whole = (chain.int(), *numbers, period)

        def side(span: Span) -> Tokens:
            return Tokens(*(None if x is None else x[slice(*span)] for x in whole))

        return Positions(
            side(layout.row_span()), side(layout.col_span()), classes.T.int().contiguous(),
            self.options.r_max, self.options.s_max, self.options.entities_only,
        )  # fmt: skip


@dataclass(frozen=True)
class _Listed:
    """Listed pairs inside this tile, sorted by row: `rows` on the host, the rest on the device."""

    rows: list[int]
    places: Tensor  # [n, 2], row and column of the tile
    picked: Tensor  # [n], position in the list of all pairs

    def between(self, lo: int, hi: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return (rows from lo, columns, positions in the list) of the pairs in tile rows lo:hi."""
        a, b = bisect_left(self.rows, lo), bisect_left(self.rows, hi)
        if a == b:
            return None
        return self.places[a:b, 0] - lo, self.places[a:b, 1], self.picked[a:b]


def _listed(index: Tensor, layout: PairLayout) -> _Listed:
    (r0, r1), (c0, c1) = layout.tile_box()
    i, j = index[0].unbind(-1)
    picked = ((i >= r0) & (i < r1) & (j >= c0) & (j < c1)).nonzero()[:, 0]
    places = index[0, picked] - index.new_tensor([r0, c0])
    return _Listed(places[:, 0].tolist(), places, picked)


@dataclass(frozen=True)
class ContactOptions:
    """Say which distances a contact constraint may name, in angstrom.

    Attributes:
        shortest: the shortest.
        longest: the longest.
    """

    shortest: float
    longest: float


class PairEmbedding:
    """Relative positions, bonds and contact constraints, added to rows of a pair tile.

    It holds modules of the model and no parameters of its own, so it is not itself a module.

    Args:
        rel_pos: encodes the relative positions.
        token_bonds: Linear(1, C) without bias.
        token_bonds_type: Embedding of bond types, or None.
        contact_conditioning: the Boltz module, or None.
        contacts: its options, needed with it.

    Raises:
        ValueError: `token_bonds` reads more than the one bond feature that Boltz-2 computes.
    """

    def __init__(
        self,
        rel_pos: RelativePositionEncoder,
        token_bonds: nn.Linear,
        token_bonds_type: nn.Embedding | None,
        contact_conditioning: nn.Module | None,
        contacts: ContactOptions | None = None,
    ) -> None:
        if token_bonds.weight.shape[1] != 1:
            raise ValueError(
                f"`token_bonds` reads {token_bonds.weight.shape[1]} bond features; expected 1: use "
                "a checkpoint with maximum_bond_distance 0"
            )
        self.rel_pos = rel_pos
        self.token_bonds, self.token_bonds_type = token_bonds, token_bonds_type
        self.contact_conditioning, self.contacts = contact_conditioning, contacts
        self._lists: tuple[tuple[Any, ...], _Listed, _Listed] | None = None

    def relpos_rows(self, feats: Feats, layout: PairLayout, lo: int, hi: int) -> Tensor:
        """Encode the relative positions of tile rows lo:hi, see `RelativePositionEncoder.rows`.

        Args:
            feats: collated compact features.
            layout: the tiling.
            lo: first row of the tile.
            hi: end of the rows, exclusive.
        """
        return self.rel_pos.rows(feats, layout, lo, hi)

    @torch.no_grad()
    def add_rows_(self, out: Tensor, feats: Feats, layout: PairLayout, lo: int, hi: int) -> None:
        """Add relative positions, bonds and contacts to tile rows lo:hi in place, without gradient.

        Args:
            out: rows lo:hi of a pair tile [1, hi - lo, T_c, C]; changed.
            feats: collated compact features.
            layout: the tiling.
            lo: first row of the tile.
            hi: end of the rows, exclusive.

        Raises:
            ValueError: `out` does not have the shape of these rows.
        """
        if out.shape[:3] != (1, hi - lo, layout.tile_cols):
            raise ValueError(
                f"`out` is {list(out.shape)}; rows {lo}:{hi} of the tile are expected as "
                f"[1, {hi - lo}, {layout.tile_cols}, C]: pass z[:, {lo}:{hi}]"
            )
        table = self.rel_pos.table()
        if self.contact_conditioning is not None:
            table += self._contact_default(feats)
        if self.token_bonds_type is not None:
            table += self.token_bonds_type.weight[0]
        add_relative_position(out, table, self.rel_pos.positions(feats, layout).cut(lo, hi))
        self._add_listed(out, feats, layout, lo, hi)

    def _add_listed(self, out: Tensor, feats: Feats, layout: PairLayout, lo: int, hi: int) -> None:
        bonds = feats["token_bond_index"]
        contacts = bonds[:, :0] if self.contact_conditioning is None else feats["contact_index"]
        key = (layout, bonds, feats.get("contact_index"))
        held = self._lists
        if held is None or not _unchanged(held[0], key):
            self._lists = held = (key, _listed(bonds, layout), _listed(contacts, layout))
        for pairs, values in ((held[1], self._bonds), (held[2], self._contacts)):
            found = pairs.between(lo, hi)
            if found is not None:
                rows, cols, picked = found
                update = values(feats, picked).to(out.dtype)
                out[0].index_put_((rows, cols), update, accumulate=True)

    def _bonds(self, feats: Feats, picked: Tensor) -> Tensor:
        """Return what a bonded pair adds to an unbonded one, [n, C]."""
        update = self.token_bonds.weight[:, 0].expand(picked.numel(), -1)
        if self.token_bonds_type is None:
            return update
        kinds = self.token_bonds_type.weight
        return update + kinds[feats["token_bond_type"][0, picked]] - kinds[0]

    def _contact_default(self, feats: Feats) -> Tensor:
        """Embed a pair without a constraint, [C]; the choice stays on the device."""
        c = self.contact_conditioning
        both = torch.stack([c.encoding_unspecified, c.encoding_unselected])
        return both.index_select(0, feats["contact_default"].reshape(1))[0]

    def _contacts(self, feats: Feats, picked: Tensor) -> Tensor:
        """Return what a constrained pair adds to an unconstrained one, [n, C]."""
        c, options = self.contact_conditioning, self.contacts
        limit = feats["contact_threshold_value"][0, picked]
        limit = (limit - options.shortest) / (options.longest - options.shortest)
        waves = torch.cos(2 * pi * c.fourier_embedding.proj(limit[:, None]))
        kinds = c.encoder.in_features - 1 - waves.shape[1]
        kind = torch.eye(kinds, dtype=limit.dtype, device=limit.device)
        kind = kind[feats["contact_type"][0, picked] - _FIRST_CONTACT]
        x = c.encoder(torch.cat([kind, limit[:, None], waves.to(limit.dtype)], -1))
        return x - self._contact_default(feats)
