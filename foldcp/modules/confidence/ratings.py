"""Hold what a confidence module says of its samples, and join what was computed one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TMScores:
    """Expected TM scores of M samples.

    Args:
        ptm: of the whole complex [M].
        iptm: between chains [M].
        ligand_iptm: between ligands and proteins [M].
        protein_iptm: between proteins [M].
        pair_chains_iptm: by the chain of the columns, then by the chain of the rows, [M] each.
    """

    ptm: Tensor
    iptm: Tensor
    ligand_iptm: Tensor
    protein_iptm: Tensor
    pair_chains_iptm: dict[int, dict[int, Tensor]]


@dataclass(frozen=True)
class Ratings:
    """Confidence in M samples.

    Args:
        plddt: [M, N], [M, A] with atom-level confidence.
        complex_plddt: its mean [M].
        complex_iplddt: weighted by interfaces [M].
        complex_pde: expected distance error over all pairs [M], angstrom.
        complex_ipde: over pairs of different chains [M], angstrom.
        tm: TM scores.
        pae: expected aligned errors [M, N, N] in angstrom, in host memory on the root rank; None
            elsewhere, and where a sink took them.
        pde: expected distance errors, like `pae`.
    """

    plddt: Tensor
    complex_plddt: Tensor
    complex_iplddt: Tensor
    complex_pde: Tensor
    complex_ipde: Tensor
    tm: TMScores
    pae: Tensor | None = None
    pde: Tensor | None = None


def joined(found: Sequence[Ratings]) -> Ratings:
    """Join the ratings of samples in their order, none of them with matrices."""
    joint: Ratings = _joined(found)
    return joint


def _joined(found: Sequence[Any]) -> Any:
    first = found[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return torch.cat(list(found))
    if isinstance(first, dict):
        return {key: _joined([x[key] for x in found]) for key in first}
    names = [field.name for field in fields(first)]
    return replace(first, **{name: _joined([getattr(x, name) for x in found]) for name in names})
