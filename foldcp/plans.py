"""The named schedules of foldcp's ops: which region each rank wants at each step. Integers only."""

from __future__ import annotations

from functools import lru_cache

from foldcp.layout import Box, PairLayout, Span
from foldcp.schedule import Plan, Schedule, Want, plan


def chunks(length: int, count: int) -> tuple[Span, ...]:
    """Cut `length` in at most `count` spans of (nearly) equal size; at least one span."""
    width = max(1, -(-length // max(1, count)))
    return tuple((i, min(i + width, length)) for i in range(0, max(length, 1), width))


@lru_cache(maxsize=512)
def triangle_multiplication_plan(
    layout: PairLayout, channels: int, outgoing: bool, pieces: int, route: str
) -> Plan:
    """Panels of the planes a and b [channels, rows, cols], cut in `pieces` channel chunks.

    At step (chunk, t) rank (r, c) wants a over (rows_r, panel) and b over (cols_c, panel) for the
    outgoing update, and the transposed regions for the incoming one.
    """
    spans = chunks(channels, pieces)

    def own(rank: int, source: int) -> Box:
        return ((0, channels), *layout.tile_box(rank))

    def want(rank: int, step: int) -> tuple[Want, ...]:
        depth, t = divmod(step, layout.panels)
        k = layout.panel_span(layout.panel_at(rank, t))
        out = []
        for source, span in enumerate((layout.row_span(rank), layout.col_span(rank))):
            out.append(Want(source, (spans[depth], *((span, k) if outgoing else (k, span)))))
        return tuple(out)

    steps = len(spans) * layout.panels
    return plan(Schedule(layout.size, steps, own, want, route), layout.rank, 2)


@lru_cache(maxsize=512)
def channel_plan(layout: PairLayout, channels: int) -> Plan:
    """Bring the planes a and b [channels, rows, cols] of all pairs to the rank of their channel."""

    def own(rank: int, source: int) -> Box:
        return ((0, channels), *layout.tile_box(rank))

    def want(rank: int, step: int) -> tuple[Want, ...]:
        box = _planes_of(layout, channels, rank)
        return Want(0, box), Want(1, box)

    return plan(Schedule(layout.size, 1, own, want), layout.rank, 2)


@lru_cache(maxsize=512)
def channel_back_plan(layout: PairLayout, channels: int) -> Plan:
    """The way back of one result for `channel_plan`: all channels of this rank's tile."""

    def own(rank: int, source: int) -> Box:
        return _planes_of(layout, channels, rank)

    def want(rank: int, step: int) -> tuple[Want, ...]:
        return (Want(0, ((0, channels), *layout.tile_box(rank))),)

    return plan(Schedule(layout.size, 1, own, want), layout.rank, 1)


def _planes_of(layout: PairLayout, channels: int, rank: int) -> Box:
    """A rank's share of the channels (none where there are more ranks), over all pairs."""
    span = channels * rank // layout.size, channels * (rank + 1) // layout.size
    return span, (0, layout.padded), (0, layout.padded)


@lru_cache(maxsize=512)
def triangle_attention_plan(
    layout: PairLayout, starting: bool, chunk: Span, route: str, masked: bool = False
) -> Plan:
    """Panels of k, v for a chunk of this rank's lines, of the bias, and of the mask of the keys.

    Starting node: k, v and mask over (chunk of rows_r, panel), bias over (cols_c, panel). Ending
    node: the transposed regions, lines being columns. `chunk` is relative to the tile.
    """

    def lines(rank: int) -> Span:
        lo = (layout.row_span(rank) if starting else layout.col_span(rank))[0]
        return lo + chunk[0], lo + chunk[1]

    def own(rank: int, source: int) -> Box:
        rows, cols = layout.tile_box(rank)
        if source == 1:
            return rows, cols
        return (lines(rank), cols) if starting else (rows, lines(rank))

    def want(rank: int, step: int) -> tuple[Want, ...]:
        k = layout.panel_span(layout.panel_at(rank, step))
        other = layout.col_span(rank) if starting else layout.row_span(rank)
        keys = (lines(rank), k) if starting else (k, lines(rank))
        bias = (other, k) if starting else (k, other)
        return Want(0, keys), Want(1, bias), *((Want(2, keys),) if masked else ())

    schedule = Schedule(layout.size, layout.panels, own, want, route)
    return plan(schedule, layout.rank, 3 if masked else 2)


def key_panels(layout: PairLayout) -> tuple[Span, ...]:
    """The real tokens of the panels of keys in the order of this rank's steps; may be empty."""
    panels = [layout.panel_span(layout.panel_at(layout.rank, t)) for t in range(layout.panels)]
    return tuple((lo, lo + layout.valid((lo, hi))) for lo, hi in panels)


def line_chunks(layout: PairLayout, starting: bool, count: int) -> tuple[Span, ...]:
    """Cut the lines of a tile in at most `count` chunks that the ranks of their group share evenly.

    The group of a tile's rows are the ranks of its mesh row, that of its columns those of its mesh
    column. There are as many shards of lines in a tile as ranks in the group, so that every chunk
    has the same number of lines, at least one, for each of them.
    """
    group = layout.mesh_cols if starting else layout.mesh_rows
    return tuple((lo * group, hi * group) for lo, hi in chunks(layout.shard, count))


def _whole_lines(layout: PairLayout, starting: bool, chunk: Span, rank: int) -> Box:
    """A rank's share of a chunk of lines (relative to the tile), over all positions."""
    first, group, i = (
        (layout.row_span(rank)[0], layout.mesh_cols, rank % layout.mesh_cols)
        if starting
        else (layout.col_span(rank)[0], layout.mesh_rows, rank // layout.mesh_cols)
    )
    each = (chunk[1] - chunk[0]) // group
    assert each * group == chunk[1] - chunk[0]
    lo = first + chunk[0] + i * each
    every = (0, layout.padded)
    return ((lo, lo + each), every) if starting else (every, (lo, lo + each))


def _tile_lines(layout: PairLayout, starting: bool, chunk: Span, rank: int) -> Box:
    """A chunk of lines of a rank's tile."""
    rows, cols = layout.tile_box(rank)
    if starting:
        return (rows[0] + chunk[0], rows[0] + chunk[1]), cols
    return rows, (cols[0] + chunk[0], cols[0] + chunk[1])


@lru_cache(maxsize=512)
def rows_plan(layout: PairLayout, starting: bool, chunk: Span, sources: int) -> Plan:
    """Bring whole lines of a chunk of the tile's lines together, shared among their group.

    Sources are the chunk of z, and the mask where there is one.
    """

    def own(rank: int, source: int) -> Box:
        return _tile_lines(layout, starting, chunk, rank)

    def want(rank: int, step: int) -> tuple[Want, ...]:
        return tuple(Want(i, _whole_lines(layout, starting, chunk, rank)) for i in range(sources))

    return plan(Schedule(layout.size, 1, own, want), layout.rank, sources)


@lru_cache(maxsize=512)
def rows_back_plan(layout: PairLayout, starting: bool, chunk: Span) -> Plan:
    """The way back of one result for `rows_plan`: the chunk of lines of this rank's tile."""

    def own(rank: int, source: int) -> Box:
        return _whole_lines(layout, starting, chunk, rank)

    def want(rank: int, step: int) -> tuple[Want, ...]:
        return (Want(0, _tile_lines(layout, starting, chunk, rank)),)

    return plan(Schedule(layout.size, 1, own, want), layout.rank, 1)


@lru_cache(maxsize=512)
def rows_bias_plan(layout: PairLayout, starting: bool) -> Plan:
    """Panels of the bias of all queries; for the ending node rows are keys, columns queries."""

    def own(rank: int, source: int) -> Box:
        return layout.tile_box(rank)

    def want(rank: int, step: int) -> tuple[Want, ...]:
        k = layout.panel_span(layout.panel_at(rank, step))
        every = (0, layout.padded)
        return (Want(0, (every, k) if starting else (k, every)),)

    return plan(Schedule(layout.size, layout.panels, own, want), layout.rank, 1)


@lru_cache(maxsize=512)
def token_plan(layout: PairLayout, spans: tuple[str, ...]) -> Plan:
    """Gather token shards: one source per entry of `spans` ("rows", "cols" or "all")."""

    def own(rank: int, source: int) -> Box:
        return (layout.shard_span(rank),)

    def want(rank: int, step: int) -> tuple[Want, ...]:
        table = {
            "rows": layout.row_span(rank),
            "cols": layout.col_span(rank),
            "all": (0, layout.padded),
        }
        return tuple(Want(i, (table[s],)) for i, s in enumerate(spans))

    return plan(Schedule(layout.size, 1, own, want), layout.rank, len(spans))


@lru_cache(maxsize=512)
def partials_plan(layout: PairLayout, sources: int) -> Plan:
    """Bring the Q partial results of a mesh row to the shard that each rank owns.

    Source box: (mesh column, tokens); rank (r, c) owns (c, rows_r) and wants (all columns, shard).
    """
    q = layout.mesh_cols

    def own(rank: int, source: int) -> Box:
        return (rank % q, rank % q + 1), layout.row_span(rank)

    def want(rank: int, step: int) -> tuple[Want, ...]:
        return tuple(Want(i, ((0, q), layout.shard_span(rank))) for i in range(sources))

    # Rows of the mesh have their own partials: the rows_r of different r do not overlap.
    return plan(Schedule(layout.size, 1, own, want), layout.rank, sources)


@lru_cache(maxsize=512)
def row_plan(layout: PairLayout) -> Plan:
    """Bring the Q partial statistics of a mesh row to all of its ranks."""
    q = layout.mesh_cols

    def own(rank: int, source: int) -> Box:
        return (rank % q, rank % q + 1), layout.row_span(rank)

    def want(rank: int, step: int) -> tuple[Want, ...]:
        return (Want(0, ((0, q), layout.row_span(rank))),)

    return plan(Schedule(layout.size, 1, own, want), layout.rank, 1)


@lru_cache(maxsize=512)
def transpose_plan(layout: PairLayout, pieces: int) -> Plan:
    """Bring the region that mirrors each chunk of this rank's rows: (cols_c, rows chunk) of z."""
    spans = chunks(layout.tile_rows, pieces)

    def own(rank: int, source: int) -> Box:
        return layout.tile_box(rank)

    def want(rank: int, step: int) -> tuple[Want, ...]:
        lo = layout.row_span(rank)[0]
        a, b = spans[step]
        return (Want(0, (layout.col_span(rank), (lo + a, lo + b))),)

    return plan(Schedule(layout.size, len(spans), own, want), layout.rank, 1)


@lru_cache(maxsize=64)
def slots_plan(size: int, rank: int) -> Plan:
    """All-gather of one slot per rank."""

    def own(r: int, source: int) -> Box:
        return ((r, r + 1),)

    def want(r: int, step: int) -> tuple[Want, ...]:
        return (Want(0, ((0, size),)),)

    return plan(Schedule(size, 1, own, want), rank, 1)


@lru_cache(maxsize=64)
def root_plan(layout: PairLayout, pieces: int) -> Plan:
    """Bring whole rows of tiles to rank 0, `pieces` row chunks per tile row, one per step."""
    spans = [
        (lo + a, lo + b)
        for r in range(layout.mesh_rows)
        for lo in (r * layout.tile_rows,)
        for a, b in chunks(layout.tile_rows, pieces)
    ]

    def own(rank: int, source: int) -> Box:
        return layout.tile_box(rank)

    def want(rank: int, step: int) -> tuple[Want, ...]:
        rows = spans[step] if rank == 0 else (0, 0)
        return (Want(0, (rows, (0, layout.padded if rank == 0 else 0))),)

    return plan(Schedule(layout.size, len(spans), own, want), layout.rank, 1)
