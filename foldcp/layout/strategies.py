"""List the exchanges of each strategy of the triangle ops, in the order in which they run.

Rings, the cost model, the simulator and tests read them here. Nothing else says what travels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from foldcp.layout.cuts import (
    GROUPS,
    LEAN_GROUPS,
    channel_groups,
    channel_pieces,
    channel_widths,
    chunks,
    line_chunks,
)
from foldcp.layout.schedule import Plan
from foldcp.layout.tiles import PairLayout, Span
from foldcp.layout.triangle_plans import (
    channel_back_plan,
    channel_plan,
    rows_back_plan,
    rows_bias_plan,
    rows_plan,
    triangle_attention_plan,
    triangle_multiplication_plan,
)

MULTIPLICATION, ATTENTION = "triangle_multiplication", "triangle_attention"


@dataclass(frozen=True)
class Sizes:
    """Sizes of a triangle op that what it moves follows from.

    Args:
        z_itemsize: bytes of an element of z.
        itemsize: bytes of an element of what is computed in.
        channels: C = D.
        heads: H.
        wire: format of panels, "raw" or "fp8".
        lean: cut for lean memory, see `foldcp.layout.cuts`.
        contraction: of triangle multiplication, "same" or "fp8".
    """

    z_itemsize: int = 4
    itemsize: int = 2
    channels: int = 128
    heads: int = 4
    wire: str = "raw"
    lean: bool = False
    contraction: str = "same"

    @property
    def plane_itemsize(self) -> int:
        """Return the bytes of an element of a plane of triangle multiplication."""
        return 1 if self.contraction == "fp8" else self.itemsize

    @property
    def plane_travels(self) -> float:
        """Return the bytes of an element of a plane on the wire; FP8 planes travel as they are."""
        return 1 if self.contraction == "fp8" else self.travels(self.itemsize)

    def travels(self, itemsize: int) -> float:
        """Return the bytes of an element on the wire; FP8 has a float32 scale per 128 elements."""
        return 1 + 4 / 128 if self.wire == "fp8" else itemsize


@dataclass(frozen=True)
class Transfer:
    """One exchange of a strategy.

    Args:
        plan: of a rank.
        kinds: kind of each source, counted from 0.
        wire: bytes that a pair of each kind has on the wire.
        raw: bytes that a pair of each kind has in memory.
    """

    plan: Plan
    kinds: tuple[int, ...]
    wire: tuple[float, ...]
    raw: tuple[float, ...]


def panel_multiplication(
    layout: PairLayout, sizes: Sizes, outgoing: bool, route: str, chunk_bytes: int
) -> Iterator[tuple[Span, Plan]]:
    """List the groups of channels of triangle multiplication over panels, each with its plan.

    Args:
        layout: the tiling.
        sizes: of the op.
        outgoing: Algorithm 12 (True) or 13 (False).
        route: "direct" or "ring".
        chunk_bytes: largest temporary of a chunk.
    """
    e = sizes.plane_itemsize
    for lo, hi in channel_groups(layout, sizes.channels, e, chunk_bytes, sizes.lean):
        pieces = channel_pieces(layout, hi - lo, e, chunk_bytes)
        yield (lo, hi), triangle_multiplication_plan(layout, hi - lo, outgoing, pieces, route)


@dataclass(frozen=True)
class ThereAndBack:
    """A chunk of work that other ranks do: plans of what goes there, and of the results.

    Args:
        span: of lines, or of channels.
        there: brings what the chunk is made of to whoever works on it.
        back: brings the results to the tiles.
    """

    span: Span
    there: Plan
    back: Plan


def channel_plans(layout: PairLayout, span: Span, outgoing: bool) -> ThereAndBack:
    """Plan one chunk of channels of triangle multiplication over channels.

    Args:
        layout: the tiling.
        span: the chunk, see `channel_multiplication`.
        outgoing: Algorithm 12 (True) or 13 (False).
    """
    width = span[1] - span[0]
    there = channel_plan(layout, width, outgoing)
    return ThereAndBack(span, there, channel_back_plan(layout, width))


def row_attention(
    layout: PairLayout, starting: bool, count: int, masked: bool = False
) -> tuple[Plan, list[ThereAndBack]]:
    """List the chunks of lines of triangle attention over whole lines.

    Args:
        layout: the tiling.
        starting: Algorithm 14 (True) or 15 (False).
        count: chunks, at most.
        masked: a mask of the keys travels too.

    Returns:
        The plan of the panels of the bias, which run once for each chunk, and the chunks.
    """
    chunks_of_lines = [
        ThereAndBack(
            span,
            rows_plan(layout, starting, span, 2 if masked else 1),
            rows_back_plan(layout, starting, span),
        )
        for span in line_chunks(layout, starting, count)
    ]
    return rows_bias_plan(layout, starting), chunks_of_lines


def channel_multiplication(
    layout: PairLayout, channels: int, count: int, lean: bool = False
) -> list[list[Span]]:
    """List the chunks of channels of triangle multiplication over channels, by group.

    The planes of a group are projected together. A projection reads all of z again, in float32 as
    many bytes as a and b of all channels have in bfloat16: one per chunk would do so more often,
    fewer groups would hold more planes at a time.

    Args:
        layout: the tiling.
        channels: D.
        count: chunks, at most.
        lean: in lean memory, of more groups.
    """
    widths = channel_widths(layout, channels, count)
    ends = list(accumulate(widths))
    spans = [(end - width, end) for end, width in zip(ends, widths, strict=True)]
    each = -(-len(spans) // (LEAN_GROUPS if lean else GROUPS))
    return [spans[i : i + each] for i in range(0, len(spans), each)]


def panel_attention(
    layout: PairLayout, starting: bool, count: int, route: str, masked: bool = False
) -> Iterator[tuple[Span, Plan]]:
    """List the chunks of lines of triangle attention over panels, each with its plan.

    Args:
        layout: the tiling.
        starting: Algorithm 14 (True) or 15 (False).
        count: chunks, at most.
        route: "direct" or "ring".
        masked: a mask of the keys travels too.
    """
    for span in chunks(layout.tile_rows if starting else layout.tile_cols, count):
        yield span, triangle_attention_plan(layout, starting, span, route, masked)


def exchanges(
    op: str,
    name: str,
    layout: PairLayout,
    sizes: Sizes,
    first: bool,
    count: int,
    chunk_bytes: int,
) -> Iterator[Transfer]:
    """List every exchange that a rank takes part in, without masks.

    Args:
        op: "triangle_multiplication" or "triangle_attention".
        name: a strategy of it.
        layout: the tiling, of the rank.
        sizes: of the op.
        first: outgoing or starting; False is incoming or ending.
        count: chunks of lines or channels.
        chunk_bytes: largest temporary of a chunk.
    """
    route, e = name.removeprefix("panel-"), sizes.itemsize
    wire, bias = sizes.travels(e), sizes.heads * e
    planes = (sizes.plane_travels,), (sizes.plane_itemsize,)
    if name == "channel":
        for group in channel_multiplication(layout, sizes.channels, count, sizes.lean):
            for span in group:
                ways = channel_plans(layout, span, first)
                yield Transfer(ways.there, (0, 0), *planes)
                yield Transfer(ways.back, (0,) * layout.size, (wire,), (e,))
    elif op == MULTIPLICATION:
        found = panel_multiplication(layout, sizes, first, route, chunk_bytes)
        for _, plan in found:
            yield Transfer(plan, (0,) * len(plan.owned), *planes)
    elif name == "rows":
        line = (sizes.channels * wire,), (sizes.channels * e,)
        panels, chunks_of_lines = row_attention(layout, first, count)
        for chunk in chunks_of_lines:
            yield Transfer(chunk.there, (0,), *line)
            yield Transfer(panels, (0,) * len(panels.owned), (bias,), (bias,))
            yield Transfer(chunk.back, (0,), *line)
    else:
        keys = 2 * sizes.channels
        for _, plan in panel_attention(layout, first, count, route):
            kinds = (0,) * (len(plan.owned) // 2) + (1,) * (len(plan.owned) // 2)
            yield Transfer(plan, kinds, (keys * wire, bias), (keys * e, bias))
