"""How much each rank sends and receives in the triangle ops, without their plans: integers only.

A plan lists every piece that travels, which takes time that grows with the square of the number of
ranks. Volumes follow from the same layouts directly, for hundreds of ranks in milliseconds; a test
compares both. They are counted on the mesh with one token per shard, and grow with the square of
the shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt

from foldcp.layout.schedule import intersect, volume
from foldcp.layout.tiles import Box, PairLayout

Flow = tuple[int, int, int, int]  # sender, receiver, kind, elements


@dataclass(frozen=True)
class Load:
    """What one rank moves in one step.

    Args:
        elements: for each kind, received within the node and from others, sent likewise.
        messages: received within the node and from others.
    """

    elements: tuple[tuple[int, ...], ...]
    messages: tuple[int, int]

    def received(self, weights: Sequence[float]) -> float:
        """Sum of the received elements, each kind with its weight."""
        return sum(w * (e[0] + e[1]) for w, e in zip(weights, self.elements, strict=True))


Loads = tuple[Load, ...]  # one per rank


def _loads(flows: Sequence[Flow], size: int, node: int, kinds: int = 1) -> Loads:
    elements = [[[0] * 4 for _ in range(kinds)] for _ in range(size)]
    for sender, receiver, kind, count in flows:
        far = sender // node != receiver // node
        elements[receiver][kind][far] += count
        elements[sender][kind][2 + far] += count
    messages = [[0, 0] for _ in range(size)]
    for sender, receiver in {flow[:2] for flow in flows}:
        messages[receiver][sender // node != receiver // node] += 1
    return tuple(
        Load(tuple(tuple(kind) for kind in e), (m[0], m[1]))
        for e, m in zip(elements, messages, strict=True)
    )


@lru_cache
def _units(rows: int, cols: int) -> tuple[PairLayout, ...]:
    return tuple(PairLayout(rows * cols, rows, cols, rank) for rank in range(rows * cols))


def _fetched(me: PairLayout, kind: int, box: Box) -> Iterator[Flow]:
    """What a rank gets of a box from the owners of its parts."""
    for i in range(box[0][0] // me.tile_rows, -(-box[0][1] // me.tile_rows)):
        for j in range(box[1][0] // me.tile_cols, -(-box[1][1] // me.tile_cols)):
            owner = i * me.mesh_cols + j
            part = intersect(box, me.tile_box(owner))
            if part is not None and owner != me.rank:
                yield owner, me.rank, kind, volume(part)


@lru_cache
def panel_loads(rows: int, cols: int, first: bool, route: str, node: int) -> tuple[Loads, ...]:
    """Loads of each step of the panel schedules.

    Args:
        rows: rows of the mesh.
        cols: columns of the mesh.
        first: outgoing or starting, else incoming or ending.
        route: "direct" or "ring".
        node: ranks of a node.

    Returns:
        Kind 0 is the operand along the rank's own lines (a or b; k and v), kind 1 the other.
    """
    steps = []
    for step in range(_units(rows, cols)[0].panels):
        flows: list[Flow] = []
        for me in _units(rows, cols):
            k = me.panel_span(me.panel_at(me.rank, step))
            spans = (me.row_span(), me.col_span()) if first else (me.col_span(), me.row_span())
            for kind, span in enumerate(spans):
                box = (span, k) if first else (k, span)
                # The ranks of a mesh row (column) use a region of its rows (columns) in turn.
                in_row = (kind == 0) == first
                if route == "ring" and step > 0 and me.panels == (cols if in_row else rows):
                    r, c = (me.row, me.col + 1) if in_row else (me.row + 1, me.col)
                    flows.append((r % rows * cols + c % cols, me.rank, kind, volume(box)))
                else:
                    flows += _fetched(me, kind, box)
        steps.append(_loads(flows, rows * cols, node, 2))
    return tuple(steps)


@lru_cache
def line_loads(rows: int, cols: int, first: bool, node: int) -> Loads:
    """Loads of bringing whole lines together; of the way back they are the same."""
    group = cols if first else rows
    flows = [
        (peer.rank, me.rank, 0, peer.tile_rows * peer.tile_cols // group)
        for me in _units(rows, cols)
        for peer in _units(rows, cols)
        if peer.rank != me.rank and (peer.row == me.row if first else peer.col == me.col)
    ]
    return _loads(flows, rows * cols, node)


@lru_cache
def bias_loads(rows: int, cols: int, first: bool, node: int) -> tuple[Loads, ...]:
    """Loads of each panel of the bias of all queries."""
    steps = []
    for step in range(_units(rows, cols)[0].panels):
        flows: list[Flow] = []
        for me in _units(rows, cols):
            k, every = me.panel_span(me.panel_at(me.rank, step)), (0, me.padded)
            flows += _fetched(me, 0, (every, k) if first else (k, every))
        steps.append(_loads(flows, rows * cols, node))
    return tuple(steps)


def channel_widths(layout: PairLayout, channels: int, count: int) -> tuple[int, ...]:
    """Channels of each chunk of the strategy "channel".

    A chunk has a multiple of P channels; the last may have fewer.

    Args:
        layout: the tiling.
        channels: D.
        count: of chunks, at most.
    """
    width = layout.size * -(-channels // (layout.size * count))
    return tuple(min(width, channels - lo) for lo in range(0, channels, width))


def channels_of(rank: int, size: int, width: int) -> int:
    """Channels of a chunk of so many that a rank contracts."""
    return width * (rank + 1) // size - width * rank // size


@lru_cache
def channel_loads(size: int, width: int, node: int) -> tuple[Loads, Loads]:
    """Loads of a chunk of channels there (a and b) and back, in tiles instead of elements."""
    own = [channels_of(rank, size, width) for rank in range(size)]
    pairs = [(a, b) for a in range(size) for b in range(size) if a != b]
    there = [(a, b, 0, 2 * own[b]) for a, b in pairs if own[b]]
    back = [(a, b, 0, own[a]) for a, b in pairs if own[a]]
    return _loads(there, size, node), _loads(back, size, node)


def cannon_tiles(size: int) -> tuple[float, float]:
    """Tiles of a or b that a rank receives in triangle multiplication by Cannon's algorithm.

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
