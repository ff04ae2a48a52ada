"""Intersect boxes of tokens, and find the ranks that own the parts of one."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise, product
from math import prod

from foldcp.layout.tiles import Box, Span


def intersect(a: Box, b: Box) -> Box | None:
    """Return the common part of two boxes, None when it is empty.

    Args:
        a: a box.
        b: another one of as many dimensions.
    """
    out = []
    for (a_lo, a_hi), (b_lo, b_hi) in zip(a, b, strict=True):
        lo, hi = max(a_lo, b_lo), min(a_hi, b_hi)
        if hi <= lo:
            return None
        out.append((lo, hi))
    return tuple(out)


def volume(box: Box) -> int:
    """Number of elements of a box."""
    v = 1
    for lo, hi in box:
        v *= max(0, hi - lo)
    return v


class Owners:
    """Find the ranks that own the parts of a region of one source.

    Where the boxes of all ranks form a grid, as those of tiles do, a region is looked up by its
    bounds in each dimension; other boxes are gone through one by one.

    Args:
        boxes: of the source, one per rank; they do not overlap.
    """

    def __init__(self, boxes: Sequence[Box]) -> None:
        self.boxes = boxes
        owned = [(rank, box) for rank, box in enumerate(boxes) if volume(box)]
        self._spans = [sorted(set(spans)) for spans in zip(*(box for _, box in owned), strict=True)]
        self._at = {box: rank for rank, box in owned}
        apart = all(a[1] <= b[0] for spans in self._spans for a, b in pairwise(spans))
        self._grid = apart and prod(map(len, self._spans)) == len(owned)

    def shares(self, box: Box) -> list[tuple[int, int]]:
        """Return (rank, how many elements of the region it owns) of every owner."""
        if not self._grid:
            return [(rank, volume(part)) for rank, part in self.parts(box)]
        found: list[tuple[Box, int]] = [((), 1)]
        for cut in self._cuts(box):
            found = [((*at, own), n * (hi - lo)) for at, n in found for own, (lo, hi) in cut]
        return [(self._at[at], n) for at, n in found]

    def parts(self, box: Box) -> list[tuple[int, Box]]:
        """Return (rank, what it owns of the region) of every owner, by rank."""
        if not self._grid:
            found = ((rank, intersect(box, own)) for rank, own in enumerate(self.boxes))
            return [(rank, part) for rank, part in found if part is not None]
        hit = (zip(*cell, strict=True) for cell in product(*self._cuts(box)))
        return sorted((self._at[at], part) for at, part in hit)

    def _cuts(self, box: Box) -> list[list[tuple[Span, Span]]]:
        """The spans of the grid that a region meets, with their common parts, by dimension."""
        cuts = []
        for (lo, hi), spans in zip(box, self._spans, strict=False):
            first = bisect_right(spans, lo, key=lambda span: span[1])
            last = bisect_left(spans, hi, key=lambda span: span[0])
            met = [(own, (max(lo, own[0]), min(hi, own[1]))) for own in spans[first:last]]
            cuts.append([(own, part) for own, part in met if part[0] < part[1]])
        return cuts
