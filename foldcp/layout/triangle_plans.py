"""The schedules of the triangle ops: which region each rank wants at each step. Integers only.

Sources are cut so that what travels of one is contiguous in memory, or a few long runs, in the
region as well as in the tile: see `foldcp_kernels.triangle_attention.parts`
and the rings for the memory.
"""

from __future__ import annotations

from functools import lru_cache

from foldcp.layout.cuts import by_strips, chunks, share_of_channels, strips_of_lines
from foldcp.layout.schedule import Plan, Schedule, Want, in_parts, plan
from foldcp.layout.tiles import Box, PairLayout, Span

# One side of a patch: a region, a span of it, and a span of the tile.
Side = tuple[int, Span, Span]


def _own_panel(layout: PairLayout, rank: int, panel: int, in_cols: bool) -> Box:
    """The rows and columns of one of the panels that a rank's tile is cut in."""
    rows, cols = layout.tile_box(rank)
    width = layout.padded // layout.panels
    lo = (cols if in_cols else rows)[0] + panel * width
    return (rows, (lo, lo + width)) if in_cols else ((lo, lo + width), cols)


@lru_cache(maxsize=512)
def triangle_multiplication_plan(
    layout: PairLayout, channels: int, outgoing: bool, pieces: int, route: str
) -> Plan:
    """Plan panels of the planes a and b [channels, rows, cols], cut in `pieces` channel chunks.

    At step (chunk, t) rank (r, c) wants a over (rows_r, panel) and b over (cols_c, panel) for the
    outgoing update, and the transposed regions for the incoming one. Each panel of k of each of the
    `strips_of_lines` of a tile is a source of its own, first those of a, then those of b; wants are
    by strips too.

    Args:
        layout: the tiling.
        channels: of a plane.
        outgoing: which of the two updates.
        pieces: chunks of channels.
        route: "direct" or "ring".
    """
    own_panels, strips = layout.panels_of(outgoing), strips_of_lines(layout, outgoing)
    lines = (layout.tile_rows if outgoing else layout.tile_cols) // strips

    def own(rank: int, source: int) -> Box:
        strip, panel = divmod(source % (strips * own_panels), own_panels)
        rows, cols = _own_panel(layout, rank, panel, outgoing)
        lo = (rows if outgoing else cols)[0] + strip * lines
        span = lo, lo + lines
        return ((0, channels), *((span, cols) if outgoing else (rows, span)))

    def want(rank: int, step: int) -> tuple[Want, ...]:
        panel = layout.panel_at(rank, step)
        k, out = layout.panel_span(panel), []
        for operand, (lo, hi) in enumerate((layout.row_span(rank), layout.col_span(rank))):
            each = lines if by_strips(layout) else hi - lo
            for at in range(lo, hi, each):
                source = (operand * strips + at // lines % strips) * own_panels
                span = at, at + each
                box = ((0, channels), *((span, k) if outgoing else (k, span)))
                out.append(Want(source + panel % own_panels, box))
        return tuple(out)

    schedule = Schedule(layout.size, layout.panels, own, want, route)
    return in_parts(plan(schedule, layout.rank, 2 * strips * own_panels), chunks(channels, pieces))


@lru_cache(maxsize=512)
def channel_plan(layout: PairLayout, channels: int, outgoing: bool) -> Plan:
    """Bring the planes a and b [channels, rows, cols] of all pairs to the rank of their channel.

    A rank wants them in one region per row of tiles for the outgoing update, per column of tiles
    for the incoming one, first those of a: k is whole in each, and where k comes before the other
    token in memory, what an owner sends of a channel is contiguous in it.

    Args:
        layout: the tiling.
        channels: of the planes, of all ranks.
        outgoing: which of the two updates.
    """
    spans = _tile_spans(layout, outgoing)

    def own(rank: int, source: int) -> Box:
        return ((0, channels), *layout.tile_box(rank))

    def want(rank: int, step: int) -> tuple[Want, ...]:
        share, every = share_of_channels(channels, layout.size, rank), (0, layout.padded)
        return tuple(
            Want(source, (share, *((span, every) if outgoing else (every, span))))
            for source in (0, 1)
            for span in spans
        )

    return plan(Schedule(layout.size, 1, own, want), layout.rank, 2)


@lru_cache(maxsize=512)
def channel_back_plan(layout: PairLayout, channels: int) -> Plan:
    """Send results of `channel_plan` back: all channels of this rank's tile.

    Source i is the result for the tile of rank i.

    Args:
        layout: the tiling.
        channels: of the planes, of all ranks.
    """

    def own(rank: int, source: int) -> Box:
        return (share_of_channels(channels, layout.size, rank), *layout.tile_box(source))

    def want(rank: int, step: int) -> tuple[Want, ...]:
        return (Want(rank, ((0, channels), *layout.tile_box(rank))),)

    return plan(Schedule(layout.size, 1, own, want), layout.rank, layout.size)


@lru_cache(maxsize=4096)
def tile_patches(layout: PairLayout, rank: int, outgoing: bool) -> tuple[tuple[Side, Side], ...]:
    """Return the patches of a rank's tile by the regions of `channel_plan` that make them up.

    Args:
        layout: the tiling.
        rank: the rank.
        outgoing: which of the two updates.

    Returns:
        For each patch ((region of a, its tokens, the rows), (region of b, its tokens, the
        columns)); tokens are counted from the start of the region, rows and columns from that of
        the tile.
    """
    spans = _tile_spans(layout, outgoing)
    sides: list[list[Side]] = []
    for lo, hi in layout.tile_box(rank):
        parts = [(i, a, max(a, lo), min(b, hi)) for i, (a, b) in enumerate(spans)]
        sides.append([(i, (x - a, y - a), (x - lo, y - lo)) for i, a, x, y in parts if x < y])
    return tuple((a, b) for a in sides[0] for b in sides[1])


def _tile_spans(layout: PairLayout, rows: bool) -> list[Span]:
    """The rows (or columns) of the tiles of the mesh."""
    count, side = (
        (layout.mesh_rows, layout.tile_rows) if rows else (layout.mesh_cols, layout.tile_cols)
    )
    return [(i * side, (i + 1) * side) for i in range(count)]


@lru_cache(maxsize=512)
def triangle_attention_plan(
    layout: PairLayout, starting: bool, chunk: Span, route: str, masked: bool = False
) -> Plan:
    """Plan panels of k, v for a chunk of this rank's lines, of the bias, and of the key mask.

    Starting node: k, v and mask over (chunk of rows_r, panel), bias over (cols_c, panel). Ending
    node: the transposed regions, lines being columns. `chunk` is relative to the tile. Each panel
    of keys of a tile is a source of its own: those of k, v, then those of the bias, of the mask.

    Args:
        layout: the tiling.
        starting: lines are rows; else columns.
        chunk: of the tile's lines.
        route: "direct" or "ring".
        masked: the mask of the keys travels, too.
    """
    own_panels = layout.panels_of(starting)

    def lines(rank: int) -> Span:
        lo = (layout.row_span(rank) if starting else layout.col_span(rank))[0]
        return lo + chunk[0], lo + chunk[1]

    def own(rank: int, source: int) -> Box:
        kind, panel = divmod(source, own_panels)
        rows, cols = _own_panel(layout, rank, panel, starting)
        if kind == 1:
            return rows, cols
        return (lines(rank), cols) if starting else (rows, lines(rank))

    def want(rank: int, step: int) -> tuple[Want, ...]:
        panel = layout.panel_at(rank, step)
        k, at = layout.panel_span(panel), panel % own_panels
        other = layout.col_span(rank) if starting else layout.row_span(rank)
        keys = (lines(rank), k) if starting else (k, lines(rank))
        bias = (other, k) if starting else (k, other)
        out = Want(at, keys), Want(own_panels + at, bias)
        return (*out, Want(2 * own_panels + at, keys)) if masked else out

    schedule = Schedule(layout.size, layout.panels, own, want, route)
    return plan(schedule, layout.rank, (3 if masked else 2) * own_panels)


@lru_cache(maxsize=512)
def key_panels(layout: PairLayout) -> tuple[Span, ...]:
    """Return the real tokens of the key panels in the order of this rank's steps; may be empty."""
    panels = [layout.panel_span(layout.panel_at(layout.rank, t)) for t in range(layout.panels)]
    return tuple((lo, lo + layout.valid((lo, hi))) for lo, hi in panels)


def last_key_step(layout: PairLayout) -> int:
    """Return the last of this rank's steps whose key panel has real tokens."""
    return max(step for step, (lo, hi) in enumerate(key_panels(layout)) if lo < hi)


def _parts_of_lines(layout: PairLayout, starting: bool, chunk: Span, rank: int, whole: bool) -> Box:
    """Boxes of lines as (parts, lines, positions of a part); a part is one rank's of the group.

    Args:
        chunk: of the tile's lines.
        whole: this rank's share of them, in all parts; else all of them, in the part that this rank
            holds.
    """
    r, c = divmod(rank, layout.mesh_cols)
    group, part = (layout.mesh_cols, c) if starting else (layout.mesh_rows, r)
    first = (layout.row_span(rank) if starting else layout.col_span(rank))[0] + chunk[0]
    each = (chunk[1] - chunk[0]) // group
    assert each * group == chunk[1] - chunk[0]
    positions = (0, layout.tile_cols if starting else layout.tile_rows)
    if whole:
        lo = first + part * each
        return (0, group), (lo, lo + each), positions
    return (part, part + 1), (first, first + each * group), positions


@lru_cache(maxsize=512)
def rows_plan(layout: PairLayout, starting: bool, chunk: Span, sources: int) -> Plan:
    """Bring whole lines of a chunk of the tile's lines together, shared among their group.

    Sources are the chunk of z, and the mask where there is one. Boxes are those of
    `_parts_of_lines`: what a rank sends is contiguous in the region that it is a part of.

    Args:
        layout: the tiling.
        starting: lines are rows; else columns.
        chunk: of the tile's lines.
        sources: number of tensors: z, and the mask where there is one.
    """
    return _lines_plan(layout, starting, chunk, sources, False)


@lru_cache(maxsize=512)
def rows_back_plan(layout: PairLayout, starting: bool, chunk: Span) -> Plan:
    """Send one result of `rows_plan` back: the chunk of lines of this rank's tile.

    Args:
        layout: the tiling.
        starting: lines are rows; else columns.
        chunk: of the tile's lines.
    """
    return _lines_plan(layout, starting, chunk, 1, True)


def _lines_plan(layout: PairLayout, starting: bool, chunk: Span, sources: int, back: bool) -> Plan:
    def box(rank: int, whole: bool) -> Box:
        return _parts_of_lines(layout, starting, chunk, rank, whole)

    def own(rank: int, source: int) -> Box:
        return box(rank, back)

    def want(rank: int, step: int) -> tuple[Want, ...]:
        return tuple(Want(i, box(rank, not back)) for i in range(sources))

    return plan(Schedule(layout.size, 1, own, want), layout.rank, sources)


@lru_cache(maxsize=512)
def rows_bias_plan(layout: PairLayout, starting: bool) -> Plan:
    """Plan panels of the bias of all queries; for the ending node rows are keys, columns queries.

    Each panel of keys of a tile is a source of its own.

    Args:
        layout: the tiling.
        starting: lines are rows; else columns.
    """
    own_panels = layout.panels_of(starting)

    def own(rank: int, source: int) -> Box:
        return _own_panel(layout, rank, source, starting)

    def want(rank: int, step: int) -> tuple[Want, ...]:
        panel = layout.panel_at(rank, step)
        k, every = layout.panel_span(panel), (0, layout.padded)
        return (Want(panel % own_panels, (every, k) if starting else (k, every)),)

    return plan(Schedule(layout.size, layout.panels, own, want), layout.rank, own_panels)
