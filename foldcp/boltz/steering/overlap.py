"""Overlap of atoms of different chains, in memory linear in the atoms.

The energy of a pair is zero unless it is closer than the sum of its radii times a factor, less
than 4 angstrom. Atoms are sorted by cells of that size, and a pair is looked at only when its
cells touch. Cells are numbers in a sorted list, so empty space costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from foldcp.boltz.steering.potentials import chain_of_atom, vdw_radii
from foldcp.boltz.steering.terms import Features, Parameters

_PAIRS_AT_ONCE = 1 << 19
_MARGIN = 1 + 1e-5  # of a cell over the reach: distances are rounded


def overlap(feats: Features, parameters: Parameters) -> Overlap | None:
    """Prepare the potential; None when no two chains could overlap.

    Chains of one atom (ions) and pairs of chains that a bond connects are left out, as in stock.

    Args:
        feats: compact features, collated.
        parameters: of stock's VDWOverlapPotential.
    """
    real, chain = feats["atom_pad_mask"][0].bool(), chain_of_atom(feats)
    size = torch.bincount(chain[real], minlength=int(feats["asym_id"].max()) + 1)
    atoms = (real & (size > 1)[chain]).nonzero()[:, 0]
    chains = int((size > 1).sum())
    first, second = feats["connected_chain_index"][0]
    both = (size > 1)[first] & (size > 1)[second] & (first != second)
    ends = torch.stack((torch.minimum(first, second), torch.maximum(first, second)))[:, both]
    connected = (ends[0] * len(size) + ends[1]).unique()  # sorted
    if chains * (chains - 1) // 2 == len(connected):
        return None
    radius = vdw_radii(feats)[atoms]
    share = 1.0 - parameters["buffer"]
    return Overlap(atoms, chain[atoms], radius, share, connected, len(size))


class Overlap:
    """Lower bounds on distances between atoms of different chains; see `terms.Term`.

    A coordinate that is not finite makes the gradient of its whole sample NaN.

    Args:
        atoms: indices of the n atoms that take part.
        chain: of each, long [n].
        radius: of each in angstrom, [n].
        share: of the sum of two radii that is the bound.
        connected: pairs of chains to leave out, sorted numbers `lower * chains + higher`.
        chains: greater than every chain.
    """

    def __init__(
        self,
        atoms: Tensor,
        chain: Tensor,
        radius: Tensor,
        share: float,
        connected: Tensor,
        chains: int,
    ) -> None:
        self._atoms, self._chain, self._radius, self._share = atoms, chain, radius, share
        self._connected, self._chains = connected, chains
        self._reach = max(2 * float(radius.max()) * share * _MARGIN, 1e-3)

    def energy(self, coords: Tensor, parameters: Mapping[str, Any]) -> Tensor:
        """See `Term`."""
        total = coords.new_zeros(coords.shape[0])
        for sample, _, _, depth, _ in self._close(coords):
            total.index_add_(0, sample, depth)
        return total

    def gradient(self, coords: Tensor, parameters: Mapping[str, Any]) -> Tensor:
        """See `Term`."""
        total = torch.zeros_like(coords)
        flat = total.view(-1, 3)
        for sample, first, second, _, push in self._close(coords):
            rows = sample * coords.shape[1]
            flat.index_add_(0, rows + self._atoms.take(first), push)
            flat.index_add_(0, rows + self._atoms.take(second), -push)
        bad = ~coords.index_select(1, self._atoms).isfinite().all(-1).all(-1)
        spoilt = torch.where(bad, torch.nan, 0.0).to(coords.dtype)[:, None, None]
        return total.index_add_(1, self._atoms, spoilt.expand(-1, len(self._atoms), 3))

    def _close(self, coords: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """Pairs near each other: (sample, first, second atom of n, depth, gradient by first).

        Pairs that do not overlap have depth and gradient 0.
        """
        x = coords.index_select(1, self._atoms)
        flat, n = x.flatten(0, 1), x.shape[1]
        for first, second in near_pairs(x, self._reach):
            sample = first // n
            i, j = first % n, second % n
            r = flat.index_select(0, first) - flat.index_select(0, second)
            distance = torch.linalg.norm(r, dim=-1)
            depth = (self._radius.take(i) + self._radius.take(j)) * self._share - distance
            hit = (depth > 0) & self._apart(self._chain.take(i), self._chain.take(j))
            push = torch.where(hit[:, None], -r / distance[:, None], 0.0)
            yield sample, i, j, torch.where(hit, depth, 0.0), push

    def _apart(self, a: Tensor, b: Tensor) -> Tensor:
        """True where chains differ and no bond connects them."""
        apart = a != b
        if len(self._connected):
            key = torch.minimum(a, b) * self._chains + torch.maximum(a, b)
            at = torch.searchsorted(self._connected, key).clamp(max=len(self._connected) - 1)
            apart &= self._connected.take(at) != key
        return apart


def near_pairs(
    x: Tensor, reach: float, at_once: int = _PAIRS_AT_ONCE
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield every pair of points of a sample within `reach` once, and others a few cells away.

    The host waits for the device once, for the number of pairs.

    Args:
        x: points [M, n, 3] of M samples. Points that are not finite may be in any pairs.
        reach: the distance.
        at_once: pairs of one result.

    Returns:
        Pairs (first, second): indices into the points [M n], long [at_once].
    """
    samples, n, _ = x.shape
    bits = (62 - samples.bit_length()) // 3
    half = 1 << (bits - 1)
    # Points beyond the last cell count as in it: cells that touch still touch. The outermost
    # cells stay free, so that a step from a cell never lands in another row's.
    cell = (x.double() / reach).nan_to_num().floor().clamp(1 - half, half - 2).long() + half
    key = torch.arange(samples, device=x.device)[:, None]
    for axis in cell.unbind(-1):
        key = (key << bits) + axis
    key, order = key.flatten().sort()
    # Of the 27 cells around a point half are looked at: five runs of keys, the first of them what
    # follows the point in its own cell and the next.
    row = 1 << bits
    steps = (0, row, row * (row - 1), row * row, row * (row + 1))
    centre = torch.stack([key + step for step in steps])  # [5, M n]
    start = torch.searchsorted(key, centre - 1)
    start[0] = torch.arange(1, samples * n + 1, device=x.device)
    count = (torch.searchsorted(key, centre + 1, right=True) - start).flatten()
    end = count.cumsum(0)
    shift = start.flatten() - (end - count)
    total = int(end[-1])
    for lo in range(0, total, at_once):
        pair = torch.arange(lo, min(lo + at_once, total), device=x.device)
        run = torch.searchsorted(end, pair, right=True)
        yield order.take(run % (samples * n)), order.take(pair + shift.take(run))
