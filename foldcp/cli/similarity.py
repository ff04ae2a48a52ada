"""Compare two structures of the same atoms: superposition, RMSD, lDDT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_RADIUS, _STEPS = 15.0, (0.5, 1.0, 2.0, 4.0)  # of lDDT, angstrom
_PAIRS = 1 << 22  # of atoms at a time
Array = NDArray[Any]


def rmsd(a: Array, b: Array) -> float:
    """Return the root mean square distance of atoms a and b [atoms, 3], in their unit.

    Args:
        a: [atoms, 3].
        b: [atoms, 3].
    """
    return float(np.sqrt(np.mean(np.sum((a - b) ** 2, axis=-1))))


def superposed(a: Array, b: Array) -> Array:
    """Move a onto b by the rotation and the shift of least RMSD.

    Args:
        a: [atoms, 3].
        b: [atoms, 3].

    Returns:
        [atoms, 3].

    Source: Kabsch (1976), Acta Cryst. A32, 922-923.
    """
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return a
    center_a, center_b = a.mean(0), b.mean(0)
    u, _, v = np.linalg.svd((a - center_a).T @ (b - center_b))
    flip = np.diag([1.0, 1.0, np.sign(np.linalg.det(u @ v)) or 1.0])
    return (a - center_a) @ (u @ flip @ v) + center_b


def lddt(a: Array, b: Array, residues: Sequence[Any]) -> float:
    """Share of distances of b up to 15 A that a keeps, mean over 0.5, 1, 2 and 4 A.

    Args:
        a: [atoms, 3], angstrom.
        b: [atoms, 3], angstrom.
        residues: of each atom; pairs within one do not count.

    Returns:
        0 to 1; 1 where there is no such pair.

    Source: Mariani, Biasini, Barbato, Schwede (2013), Bioinformatics 29(21), 2722-2728.
    """
    from scipy.spatial import KDTree

    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return 0.0
    numbers: dict[Any, int] = {}
    of = np.array([numbers.setdefault(residue, len(numbers)) for residue in residues])
    tree, kept, count = KDTree(b), 0, 0
    near = tree.query_ball_point(b, _RADIUS, return_length=True)
    step = max(1, _PAIRS // max(1, int(near.max())))
    for lo in range(0, len(b), step):
        found = tree.query_ball_point(b[lo : lo + step], _RADIUS)
        first = np.repeat(np.arange(lo, lo + len(found)), [len(x) for x in found])
        second = np.concatenate([np.asarray(x, dtype=int) for x in found])
        apart = of[first] != of[second]
        first, second = first[apart], second[apart]
        gap = np.abs(
            np.linalg.norm(a[first] - a[second], axis=-1)
            - np.linalg.norm(b[first] - b[second], axis=-1)
        )
        kept += sum(int((gap < limit).sum()) for limit in _STEPS)
        count += len(_STEPS) * len(gap)
    return kept / count if count else 1.0
