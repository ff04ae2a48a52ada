"""Evaluate the terms of Boltz's steering potentials, each prepared once for a sample.

A potential is a sum of flat bottoms: zero while a measure (distance, dihedral, deviation from a
template) lies within its bounds, linear outside with slope 1. Stock Boltz builds one-hot maps of
atoms and tokens at each call; here lists of atoms and bounds are all that is kept. Where stock's
formulas differ from a textbook's, a comment says so: results are stock's.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any, Protocol

import torch
from torch import Tensor

from foldcp.modules.diffusion.superposition import Superposition

Features = Mapping[str, Tensor]
Parameters = Mapping[str, Any]


class Term(Protocol):
    """A potential prepared for one sample."""

    def energy(self, coords: Tensor, parameters: Parameters) -> Tensor:
        """Sum the potential over its places.

        Args:
            coords: of M structures [M, A, 3], angstrom.
            parameters: of the potential at this time, by Boltz's names.

        Returns:
            The energies [M].
        """

    def gradient(self, coords: Tensor, parameters: Parameters) -> Tensor:
        """Differentiate the energy by the coordinates.

        Args:
            coords: of M structures [M, A, 3], angstrom.
            parameters: of the potential at this time, by Boltz's names.

        Returns:
            The gradient [M, A, 3].
        """


def flat_bottom(
    value: Tensor, lower: Tensor | float, upper: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Return how far values lie outside their bounds, and the derivative: 1, 0 or -1.

    Args:
        value: [..., n].
        lower: lower bounds [n] or a number; infinite where there is none.
        upper: upper bounds [n] or a number; infinite where there is none.
    """
    below, above = value < lower, value > upper
    inside = torch.zeros_like(value)
    energy = torch.where(above, value - upper, torch.where(below, lower - value, inside))
    return energy, above.to(value.dtype) - (below & ~above).to(value.dtype)


class Distances:
    """Bounds on distances between pairs of atoms.

    Args:
        index: the pairs [2, n].
        lower: lower bound in angstrom, see `flat_bottom`.
        upper: upper bound in angstrom, see `flat_bottom`.
    """

    def __init__(
        self, index: Tensor, lower: Tensor | float = -inf, upper: Tensor | float = inf
    ) -> None:
        self.index, self.lower, self.upper = index, lower, upper

    def energy(self, coords: Tensor, parameters: Parameters) -> Tensor:
        """See `Term`."""
        return flat_bottom(self.measure(coords)[0], self.lower, self.upper)[0].sum(-1)

    def gradient(self, coords: Tensor, parameters: Parameters) -> Tensor:
        """See `Term`."""
        value, directions = self.measure(coords)
        return self.spread(coords, flat_bottom(value, self.lower, self.upper)[1], directions)

    def spread(self, coords: Tensor, slope: Tensor, directions: Tensor) -> Tensor:
        """Sum slope [M, n] times directions [M, k, n, 3] over the atoms that they belong to.

        Args:
            coords: gives shape and dtype, [M, A, 3].
            slope: derivative by each value, [M, n].
            directions: derivatives of the values by their k atoms, [M, k, n, 3].
        """
        parts = (slope[:, None, :, None] * directions).flatten(1, 2)
        return torch.zeros_like(coords).index_add(1, self.index.flatten(), parts)

    def measure(self, coords: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values [M, n] and their derivatives by the k atoms of each, [M, k, n, 3]."""
        first, second = (coords.index_select(1, atoms) for atoms in self.index)
        r = first - second
        length = torch.linalg.norm(r, dim=-1)
        unit = r / length[..., None]
        return length, torch.stack((unit, -unit), dim=1)


class Dihedrals(Distances):
    """Bounds in radians on dihedral angles of four atoms each, index [4, n].

    Source: Blondel and Karplus 1996, for the derivatives.
    """

    def measure(self, coords: Tensor) -> tuple[Tensor, Tensor]:
        """See `Distances.measure`."""
        i, j, k, l = (coords.index_select(1, atoms) for atoms in self.index)  # noqa: E741
        axis = k - j
        a, b = torch.linalg.cross(i - j, axis), torch.linalg.cross(axis, k - l)
        length, a_length, b_length = (torch.linalg.norm(x, dim=-1) for x in (axis, a, b))
        cosine = (a * b).sum(-1) / (a_length * b_length)
        side = torch.sign((axis * torch.linalg.cross(a, b)).sum(-1))
        angle = side * torch.arccos(cosine.clamp(-1 + 1e-8, 1 - 1e-8))
        by_i = a * (length / a_length**2)[..., None]
        by_l = -b * (length / b_length**2)[..., None]
        along_i = (((i - j) * axis).sum(-1) / length**2)[..., None]
        along_l = (((k - l) * axis).sum(-1) / length**2)[..., None]
        by_j = (along_i - 1) * by_i - along_l * by_l
        by_k = (along_l - 1) * by_l - along_i * by_i
        return angle, torch.stack((by_i, by_j, by_k, by_l), dim=1)


class UnsignedDihedrals(Dihedrals):
    """Bounds on the size of dihedral angles."""

    def measure(self, coords: Tensor) -> tuple[Tensor, Tensor]:
        """See `Distances.measure`."""
        angle, directions = super().measure(coords)
        return angle.abs(), torch.where((angle < 0)[:, None, :, None], -directions, directions)


class Contacts(Distances):
    """Bounds on distances of which one in each union has to hold.

    Args:
        index: pairs [2, n].
        lower: lower bounds [n].
        upper: upper bounds [n].
        union: of each pair, long [n].
    """

    def __init__(self, index: Tensor, lower: Tensor, upper: Tensor, union: Tensor) -> None:
        super().__init__(index, lower, upper)
        self._union, self._unions = union, int(union.max()) + 1

    def energy(self, coords: Tensor, parameters: Parameters) -> Tensor:
        """See `Term`."""
        energy = flat_bottom(self.measure(coords)[0], self.lower, self.upper)[0]
        return (energy * self._share(energy, parameters)).sum(-1)

    def gradient(self, coords: Tensor, parameters: Parameters) -> Tensor:
        """See `Term`."""
        value, directions = self.measure(coords)
        energy, slope = flat_bottom(value, self.lower, self.upper)
        share = self._share(energy, parameters)
        mean = self._total(energy * share)
        # Stock's sign: the derivative of the weighted mean has a minus before the strength.
        slope = slope * share * (1 + parameters["union_lambda"] * (energy - mean))
        return self.spread(coords, slope, directions)

    def _total(self, x: Tensor) -> Tensor:
        """Sum over the union of each pair, [M, n]."""
        total = x.new_zeros(x.shape[0], self._unions).index_add(1, self._union, x)
        return total.index_select(1, self._union)

    def _share(self, energy: Tensor, parameters: Parameters) -> Tensor:
        """Weigh each pair in its union; none where all of them underflow, as in stock."""
        weight = torch.exp(-parameters["union_lambda"] * energy)
        total = self._total(weight)
        return torch.where(total == 0, 0.0, weight / total)


class ChainCentres:
    """A lower bound, `parameters["buffer"]`, on distances between centres of equal chains.

    Args:
        pairs: of chains [2, n].
        chain: of each atom, long [A].
        real: indices of real atoms.
    """

    def __init__(self, pairs: Tensor, chain: Tensor, real: Tensor) -> None:
        self._pairs, self._chain, self._real, self._real_chain = pairs, chain, real, chain[real]
        # Stock averages the atoms of a chain and one more at the origin.
        self._size = torch.bincount(self._real_chain)[:, None] + 1

    def energy(self, coords: Tensor, parameters: Parameters) -> Tensor:
        """See `Term`."""
        return self._distances(parameters).energy(self._centres(coords), parameters)

    def gradient(self, coords: Tensor, parameters: Parameters) -> Tensor:
        """See `Term`; each atom gets the whole derivative of its centre, as in stock."""
        centres = self._centres(coords)
        gradient = self._distances(parameters).gradient(centres, parameters)
        return gradient.index_select(1, self._chain)

    def _distances(self, parameters: Parameters) -> Distances:
        return Distances(self._pairs, lower=parameters["buffer"])

    def _centres(self, coords: Tensor) -> Tensor:
        total = coords.new_zeros(coords.shape[0], len(self._size), 3)
        atoms = coords.index_select(1, self._real)
        return total.index_add(1, self._real_chain, atoms) / self._size


class TemplateDeviations:
    """Upper bounds on the distances from the atoms of superposed templates.

    Args:
        places: representative atom of each token of T templates, [T, N, 3] in angstrom.
        mask: tokens that a template has, [T, N].
        upper: bounds [T] in angstrom.
        rep_atom: of each token, long [N].
        token: of each atom, long [A].
    """

    def __init__(
        self, places: Tensor, mask: Tensor, upper: Tensor, rep_atom: Tensor, token: Tensor
    ) -> None:
        self._places, self._mask, self._rep_atom, self._token = places, mask, rep_atom, token
        self._upper = torch.where(mask.bool(), upper[:, None], inf)
        self._align = [Superposition(m[None], int(m.sum())) for m in mask.to(places.dtype)]

    def energy(self, coords: Tensor, parameters: Parameters) -> Tensor:
        """See `Term`."""
        moved = [torch.linalg.norm(r, dim=-1) for r in self._deviations(coords)]
        return sum(
            flat_bottom(d, -inf, upper)[0].sum(-1)
            for d, upper in zip(moved, self._upper, strict=True)
        )

    def gradient(self, coords: Tensor, parameters: Parameters) -> Tensor:
        """See `Term`; every atom moves with its token's representative."""
        unit, slopes = None, 0.0
        for r, upper in zip(self._deviations(coords), self._upper, strict=True):
            length = torch.linalg.norm(r, dim=-1)
            slopes = slopes + flat_bottom(length, -inf, upper)[1]
            # Stock sums the slopes of all templates but points along the first one's deviation.
            unit = r / length[..., None] * self._mask[0, :, None] if unit is None else unit
        return (slopes[..., None] * unit).index_select(1, self._token)

    def _deviations(self, coords: Tensor) -> list[Tensor]:
        """Return the deviation of the structure from each superposed template, T of [M, N, 3]."""
        atoms = coords.index_select(1, self._rep_atom)
        return [
            atoms - align(places.to(atoms.dtype).expand_as(atoms), atoms)
            for align, places in zip(self._align, self._places, strict=True)
        ]
