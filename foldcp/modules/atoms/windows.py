"""This rank's windows of atoms, and the moves between atoms, tokens and ranks.

A rank keeps its own shard of windows and a halo around it, so that a stack of window layers runs
without communication. Window k (32 queries) attends to the 128 atoms from 48 before its first
query to 48 after its last, so what a layer gets wrong at the buffer's ends moves inwards by whole
windows: 1.5, then 3.5, then 5.5 windows after three layers.

Buffers of 8 windows on 4 ranks for one layer (own shard in brackets, clipped to the sample):

    rank 0   [0 1] 2 3                  rank 2   2 3 [4 5] 6 7
    rank 1   0 1 [2 3] 4 5              rank 3   4 5 [6 7]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from foldcp.fabric.exchange.autograd import fetch, scatter_add
from foldcp.fabric.mesh import Mesh
from foldcp.layout.schedule import Plan, boxes_plan
from foldcp.layout.tiles import KEYS, WINDOW, AtomLayout, PairLayout, Span

Feats = Mapping[str, Tensor]

SIDE = (KEYS - WINDOW) // 2  # keys on either side of the queries of a window
WINDOWS_PER_LAYER = 2  # of halo: what one layer reaches, in whole windows
HALF = WINDOW // 2  # windows and key windows both start at multiples of this


class TokenRanges:
    """Tokens that a run of atoms touches, as host integers.

    Args:
        token: token of each atom [A].
        mask: bool [A], False for padding atoms.
    """

    def __init__(self, token: Tensor, mask: Tensor) -> None:
        token, mask = token.reshape(-1, HALF), mask.reshape(-1, HALF)
        never = torch.iinfo(token.dtype).max
        self._first = token.masked_fill(~mask, never).amin(1).tolist()
        self._last = token.masked_fill(~mask, -1).amax(1).tolist()

    def span(self, atoms: Span) -> Span:
        """Return the tokens of atoms lo:hi (multiples of 16); empty when none of them is real."""
        lo, hi = (x // HALF for x in atoms)
        last = max(self._last[lo:hi], default=-1)
        return (0, 0) if last < 0 else (min(self._first[lo:hi]), last + 1)


@dataclass(frozen=True)
class AtomShard:
    """One rank's buffer of windows.

    Args:
        mesh: the mesh.
        layout: the tiling of tokens.
        buffers: for every rank, the atoms of its buffer; empty where it owns no window.
        own: atoms of this rank's shard, counted from the start of its buffer.
        mask: bool [a], True for real atoms.
        token: long [a], the atom's token counted from `tokens[0]`; 0 for padding atoms.
        tokens: tokens that the buffer touches.
        own_tokens: tokens that the own shard touches.
        key_mask: bool [W, 128], True for keys that are real atoms of the buffer.
        own_index: long [own], the token of the own shard's atoms counted from `own_tokens[0]`;
            padding atoms have a row of their own after the last one.
        own_counts: long [w], atoms of the own shard per token of `own_tokens`; None where atoms are
            not sorted by token.
        divisor: atoms of each token of this rank's shard, + 1e-6 as in Boltz [n, 1].
        ranges: which tokens any run of atoms touches.
        gather: exchange of `from_tokens`.
        collect: exchange of `to_tokens`.
        halo: exchange of `with_halo`.
        everyone: exchange of `gather_atoms`.
    """

    mesh: Mesh
    layout: PairLayout
    buffers: tuple[Span, ...]
    own: Span
    mask: Tensor
    token: Tensor
    tokens: Span
    own_tokens: Span
    key_mask: Tensor
    own_index: Tensor
    own_counts: Tensor | None
    divisor: Tensor
    ranges: TokenRanges
    gather: Plan
    collect: Plan
    halo: Plan
    everyone: Plan

    @property
    def span(self) -> Span:
        """Atoms of this rank's buffer."""
        return self.buffers[self.mesh.rank]

    @property
    def windows(self) -> int:
        """W, windows of this rank's buffer."""
        return (self.span[1] - self.span[0]) // WINDOW

    def cut(self, x: Tensor) -> Tensor:
        """Cut the buffer's part out of a tensor over all atoms: [M, A, ...] -> [M, a, ...]."""
        return x[:, self.span[0] : self.span[1]]

    def from_tokens(self, x: Tensor) -> Tensor:
        """Give every atom its token's row, padding atoms zero: shard [M, n, C] -> [M, a, C]."""
        (box,) = fetch(self.mesh, self.gather, (x,), ((1,),), "token_to_atom")
        if not box.shape[1]:
            return x.new_zeros(x.shape[0], *self.token.shape, x.shape[2])
        return box.index_select(1, self.token) * self.mask[:, None]

    def to_tokens(self, x: Tensor) -> Tensor:
        """Average over the atoms of each token: own shard [M, own, C] -> shard [M, n, C].

        As in Boltz the divisor is the atom count + 1e-6, so that tokens without atoms get 0.
        """
        sums = self._sums(x)
        (total,) = scatter_add(self.mesh, self.collect, (sums,), ((1,),), "atom_to_token")
        return total / self.divisor.to(total.dtype)

    def _sums(self, x: Tensor) -> Tensor:
        """Sums over the atoms of each token: own shard [M, own, C] -> [M, w, C]."""
        samples, width = x.shape[0], self.own_tokens[1] - self.own_tokens[0]
        if x.is_cuda and self.own_counts is not None:
            # Additions by index are atomic there: two runs would add in another order.
            lengths = self.own_counts.expand(samples, -1).contiguous()
            x = x.contiguous()
            return torch.segment_reduce(x, "sum", lengths=lengths, axis=1, unsafe=True)
        sums = x.new_zeros(samples, width + 1, x.shape[2]).index_add_(1, self.own_index, x)
        return sums[:, :width]

    def with_halo(self, x: Tensor) -> Tensor:
        """Refill the halo of [M, a, C] from the ranks that own its windows."""
        own = x[:, self.own[0] : self.own[1]]
        return fetch(self.mesh, self.halo, (own,), ((1,),), "atom_halo")[0]

    def gather_atoms(self, x: Tensor) -> Tensor:
        """Gather all atoms on every rank: own shard [M, own, C] -> [M, A, C]."""
        return fetch(self.mesh, self.everyone, (x,), ((1,),), "atom_gather")[0]


def atom_shard(
    feats: Feats, layout: PairLayout, atom_layout: AtomLayout, mesh: Mesh, depth: int
) -> AtomShard:
    """Prepare a rank's buffer of windows for a stack of window layers.

    Args:
        feats: collated compact features (`atom_to_token`, `atom_pad_mask`), the same on all ranks.
        layout: the tiling of tokens.
        atom_layout: the shards of windows.
        mesh: the mesh.
        depth: layers that run between two refills of the halo.

    Returns:
        The shard; building it reads `atom_to_token` on the host once.

    Raises:
        ValueError: the layout has other atoms than the features, or is for another rank.

    Source: AlphaFold 3 supplement, Algorithm 7; docs/design/layouts-and-schedules.md.
    """
    _check(feats, atom_layout, mesh)
    token, mask = feats["atom_to_token"][0], feats["atom_pad_mask"][0].bool()
    ranges = TokenRanges(token, mask)
    ranks = range(mesh.size)
    owned = tuple(atom_layout.own_span(r) for r in ranks)
    halo, end = WINDOWS_PER_LAYER * WINDOW * depth, atom_layout.atoms
    buffers = tuple(
        (max(lo - halo, 0), min(hi + halo, end)) if hi > lo else (lo, lo) for lo, hi in owned
    )
    touched = tuple(ranges.span(b) for b in buffers)
    own_touched = tuple(ranges.span(o) for o in owned)
    shards = tuple((layout.shard_span(r),) for r in ranks)
    me, (lo, hi) = mesh.rank, buffers[mesh.rank]
    counts = mask.new_zeros(layout.padded, dtype=torch.long).index_add_(0, token, mask.long())
    shard = counts[slice(*layout.shard_span())].to(feats["atom_pad_mask"].dtype)
    own, my_mask = (owned[me][0] - lo, owned[me][1] - lo), mask[lo:hi]
    own_index, own_counts = _segments(token, mask, owned[me], own_touched[me])

    def between(own: tuple[Span, ...], want: tuple[Span, ...]) -> Plan:
        return boxes_plan(mesh.size, me, tuple((o,) for o in own), tuple((w,) for w in want))

    return AtomShard(
        mesh=mesh,
        layout=layout,
        buffers=buffers,
        own=own,
        mask=my_mask,
        token=(token[lo:hi] - touched[me][0]).masked_fill(~my_mask, 0),
        tokens=touched[me],
        own_tokens=own_touched[me],
        key_mask=key_windows(my_mask[None, :, None])[0, :, 0],
        own_index=own_index,
        own_counts=own_counts,
        divisor=(shard + 1e-6)[:, None],
        ranges=ranges,
        gather=boxes_plan(mesh.size, me, shards, tuple((t,) for t in touched)),
        collect=boxes_plan(mesh.size, me, shards, tuple((t,) for t in own_touched)),
        halo=between(owned, buffers),
        everyone=between(owned, ((0, end),) * mesh.size),
    )


def _segments(token: Tensor, mask: Tensor, own: Span, tokens: Span) -> tuple[Tensor, Tensor | None]:
    """(own_index, own_counts) of an AtomShard."""
    width = tokens[1] - tokens[0]
    index = (token[slice(*own)] - tokens[0]).masked_fill(~mask[slice(*own)], width)
    if bool((index.diff() < 0).any()):
        return index, None
    return index, index.new_zeros(width + 1).index_add_(0, index, torch.ones_like(index))[:width]


def _check(feats: Feats, atom_layout: AtomLayout, mesh: Mesh) -> None:
    count = feats["atom_pad_mask"].shape[1]
    if count != atom_layout.atoms:
        raise ValueError(
            f"`atom_layout` lays out {atom_layout.atoms} atoms; feats['atom_pad_mask'] has "
            f"{count}: build AtomLayout(windows={count // WINDOW}, ...)"
        )
    if (atom_layout.size, atom_layout.rank) != (mesh.size, mesh.rank):
        raise ValueError(
            f"`atom_layout` is for rank {atom_layout.rank} of {atom_layout.size}; mesh expects "
            f"rank {mesh.rank} of {mesh.size}"
        )


def key_windows(x: Tensor) -> Tensor:
    """View the keys of every window: [M, a, C] -> [M, W, C, 128] of x padded with zeros.

    Args:
        x: values per atom of a buffer, a = 32 W.

    Returns:
        Window k holds atoms 32 k - 48 ... 32 k + 79 of the buffer, zeros outside of it.
    """
    m, a, c = x.shape
    if a == 0:
        return x.new_empty(m, 0, c, KEYS)
    return F.pad(x, (0, 0, SIDE, SIDE)).unfold(1, KEYS, WINDOW)


def query_windows(x: Tensor) -> Tensor:
    """View the queries of every window: [M, a, C] -> [M, W, 32, C]."""
    return x.unflatten(1, (x.shape[1] // WINDOW, WINDOW))
