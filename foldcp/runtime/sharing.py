"""Share inputs out over data-parallel groups; a group skips the inputs of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from foldcp.runtime.files.names import open_regular


def tokens(structure: Path) -> int:
    """Count the tokens of a processed structure: one per standard residue, else one per atom."""
    with open_regular(structure) as file, np.load(file, allow_pickle=False) as arrays:
        residues = arrays["residues"]
    whole = residues["is_standard"].astype(bool)
    return int(whole.sum() + residues["atom_num"][~whole].sum())


def cost(n: int) -> float:
    """Work of folding N tokens in TFLOP, modelled.

    Fitted to the FLOPs of Boltz-2 with three recycles and 200 steps at N = 768, 3605 and 10,000
    (triangle ops cubic, single pair ops square, diffusion linear): only ratios matter.
    """
    return 5e-7 * n**3 + 1.27e-4 * n**2 + 0.29 * n


def assign(sizes: Sequence[int], groups: int) -> list[int]:
    """Share inputs out: the largest first, each to the group with the least work so far.

    Args:
        sizes: tokens of each input.
        groups: number of groups.

    Returns:
        The group of each input. No group has more work than 4/3 of the best possible sharing.

    Source: Graham 1969, longest processing time first.
    """
    load, owner = [0.0] * groups, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        owner[i] = min(range(groups), key=lambda g: (load[g], g))
        load[owner[i]] += cost(sizes[i])
    return owner


class Share:
    """A data loader of which one group takes its own inputs.

    All groups go through all inputs in one order: what an input draws from the generators of random
    numbers depends on those before it, and results must not depend on the number of groups. Inputs
    of other groups are featurised and their draws repeated; nothing of them is computed.

    Args:
        loader: all inputs, one a batch.
        owner: group of each.
        group: this one's.
        replay: draws what folding a batch draws.
    """

    def __init__(
        self,
        loader: Any,
        owner: Sequence[int],
        group: int,
        replay: Callable[[dict[str, Any]], None],
    ) -> None:
        self._loader, self._owner, self._group, self._replay = loader, owner, group, replay

    def __len__(self) -> int:
        return sum(g == self._group for g in self._owner)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        left = len(self)
        if left == 0:
            return
        for owner, batch in zip(self._owner, self._loader, strict=True):
            if owner != self._group:
                self._replay(batch)
                continue
            left -= 1
            yield batch
            if left == 0:
                return
