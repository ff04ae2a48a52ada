"""The named schedules of foldcp's ops: which region each rank wants at each step. Integers only."""

from __future__ import annotations

from functools import lru_cache

from foldcp.layout.cuts import chunks
from foldcp.layout.schedule import Plan, Schedule, Want, plan
from foldcp.layout.tiles import Box, PairLayout


@lru_cache(maxsize=512)
def token_plan(layout: PairLayout, spans: tuple[str, ...]) -> Plan:
    """Gather token shards: one source per entry of `spans` ("rows", "cols" or "all").

    Args:
        layout: the tiling.
        spans: "rows", "cols" or "all" for each source: the tokens that a rank wants of it.
    """

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

    Args:
        layout: the tiling.
        sources: number of tensors that are brought.
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
    """Bring the region that mirrors each chunk of this rank's rows: (cols_c, rows chunk) of z.

    Args:
        layout: the tiling.
        pieces: chunks of rows, one per step.
    """
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
    """Gather one slot of every rank on all ranks.

    Args:
        size: number of ranks.
        rank: this rank.
    """

    def own(r: int, source: int) -> Box:
        return ((r, r + 1),)

    def want(r: int, step: int) -> tuple[Want, ...]:
        return (Want(0, ((0, size),)),)

    return plan(Schedule(size, 1, own, want), rank, 1)


@lru_cache(maxsize=64)
def root_plan(layout: PairLayout, pieces: int) -> Plan:
    """Bring whole rows of tiles to rank 0, `pieces` row chunks per tile row, one per step.

    Args:
        layout: the tiling.
        pieces: row chunks of a tile row, one per step.
    """
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
