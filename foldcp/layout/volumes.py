"""Add up what every rank of a mesh sends and receives in an exchange, from its schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt

from foldcp.layout.boxes import Owners, volume
from foldcp.layout.schedule import Schedule, Want, holders


@dataclass(frozen=True)
class Load:
    """Amounts that one rank moves in one step.

    Args:
        elements: for each kind of source, received within the node, received from others, sent
            within the node and sent to others.
        messages: received within the node and from others.
    """

    elements: tuple[tuple[int, ...], ...]
    messages: tuple[int, int]

    def received(self, weights: Sequence[float]) -> float:
        """Return the sum of the received elements, each kind with its weight."""
        return sum(w * (e[0] + e[1]) for w, e in zip(weights, self.elements, strict=True))


Loads = tuple[Load, ...]  # one per rank


@lru_cache(maxsize=256)
def volumes(schedule: Schedule, kinds: tuple[int, ...], node: int) -> tuple[Loads, ...]:
    """Return what each rank moves at each step.

    Args:
        schedule: of the exchange.
        kinds: of each source, counted from 0; elements of a kind are added up.
        node: ranks of a node.
    """
    ranks = range(schedule.size)
    owners = [Owners([schedule.own(r, i) for r in ranks]) for i in range(len(kinds))]
    shared: dict[Want, list[tuple[int, int]]] = {}  # many ranks want the same region
    node_of = [rank // node for rank in ranks]
    steps, before = [], None
    for step in range(schedule.steps):
        wants = [schedule.want(r, step) for r in ranks]
        ring = schedule.route == "ring" and before is not None
        held = holders(before, wants) if ring else {}  # type: ignore[arg-type]
        elements = [[[0] * 4 for _ in range(max(kinds) + 1)] for _ in ranks]
        senders: list[set[int]] = [set() for _ in ranks]
        for rank, mine in enumerate(wants):
            for slot, want in enumerate(mine):
                kind, holder = kinds[want.source], held.get((rank, slot))
                if holder is not None:
                    parts = [(holder, volume(want.box))]
                elif want in shared:
                    parts = shared[want]
                else:
                    parts = shared[want] = owners[want.source].shares(want.box)
                got, here = elements[rank][kind], node_of[rank]
                for sender, count in parts:
                    if sender != rank:
                        far = node_of[sender] != here
                        got[far] += count
                        elements[sender][kind][2 + far] += count
                        senders[rank].add(sender)
        loads = []
        for rank in ranks:
            distant = sum(node_of[sender] != node_of[rank] for sender in senders[rank])
            moved = tuple(tuple(kind) for kind in elements[rank])
            loads.append(Load(moved, (len(senders[rank]) - distant, distant)))
        steps.append(tuple(loads))
        before = wants
    return tuple(steps)


def cannon_tiles(size: int) -> tuple[float, float]:
    """Return the tiles of a or b that a rank receives in Cannon's algorithm.

    On a square mesh of side q, as Fold-CP is described in public: b is transposed (a rank off the
    diagonal receives one tile), both operands are skewed (row r shifts a by r, column c shifts b by
    c), and q products have q - 1 shifts of both operands between them.

    Args:
        size: number of ranks, a square.

    Returns:
        The mean over ranks, and the most: phases follow one another, each as long as its busiest
        rank takes.

    Source: Fold-CP (arXiv 2603.14806).
    """
    q = isqrt(size)
    return 3 * (1 - 1 / q) + 2 * (q - 1), (3 if q > 1 else 0) + 2 * (q - 1)
