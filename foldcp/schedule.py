"""Who sends what to whom at which step, derived from `(rank, step) -> region wanted`: no torch.

A schedule says which region (a box of a global tensor) each rank wants at each step, and which
box of each source tensor each rank owns. From that alone every rank derives its sends and
receives: intersect what a peer wants with what I own. `route="ring"` lets a rank take a region
from the peer that used it one step before instead of from its owner.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from foldcp.layout import Box, PairLayout, Span

ROUTES = ("direct", "ring")


def intersect(a: Box, b: Box) -> Box | None:
    """The common part of two boxes, None when it is empty."""
    out = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True))
    return None if any(hi <= lo for lo, hi in out) else out


def volume(box: Box) -> int:
    """Number of elements of a box."""
    v = 1
    for lo, hi in box:
        v *= max(0, hi - lo)
    return v


@dataclass(frozen=True)
class Want:
    """A region of one source tensor that a rank wants at a step."""

    source: int
    box: Box


@dataclass(frozen=True)
class Piece:
    """A part of one wanted region that travels between two ranks (or stays, when peer is me).

    `slot` is the region's index among the wants of the receiving rank; `held` says that the
    sender takes it from what it received one step before (ring), not from its own tile.
    """

    peer: int
    slot: int
    source: int
    box: Box
    held: int = -1


@dataclass(frozen=True)
class Step:
    """What one rank does at one step."""

    wants: tuple[Want, ...]
    local: tuple[Piece, ...]
    recvs: tuple[Piece, ...]
    sends: tuple[Piece, ...]


@dataclass(frozen=True)
class Schedule:
    """A complete description of an exchange.

    Args:
        size: number of ranks.
        steps: number of steps.
        own: `(rank, source) -> Box`; the boxes of all ranks partition each source.
        want: `(rank, step) -> tuple[Want, ...]`.
        route: "direct" (from the owner) or "ring" (from the last user where there is one).
    """

    size: int
    steps: int
    own: Callable[[int, int], Box]
    want: Callable[[int, int], tuple[Want, ...]]
    route: str = "direct"


@dataclass(frozen=True)
class Plan:
    """One rank's part of a schedule; `owned` is this rank's box of each source."""

    rank: int
    size: int
    owned: tuple[Box, ...]
    steps: tuple[Step, ...]
    adjoint: tuple[Step, ...]

    def elements(self, step: int | None = None) -> tuple[int, int]:
        """(sent, received) elements per channel, of one step or of all."""
        steps = self.steps if step is None else (self.steps[step],)
        sent = sum(volume(p.box) for s in steps for p in s.sends)
        return sent, sum(volume(p.box) for s in steps for p in s.recvs)


def _holder(schedule: Schedule, rank: int, step: int, slot: int, want: Want) -> int | None:
    """The nearest rank that wanted exactly this region one step before, None if there is none."""
    if schedule.route != "ring" or step == 0:
        return None
    size = schedule.size
    users = [
        peer
        for peer in range(size)
        if slot < len(schedule.want(peer, step - 1)) and schedule.want(peer, step - 1)[slot] == want
    ]
    # One user per receiver: the k-th rank that wants the region takes it from the k-th user.
    takers = [
        p
        for p in range(size)
        if slot < len(schedule.want(p, step)) and schedule.want(p, step)[slot] == want
    ]
    if len(users) < len(takers):
        return None
    return users[takers.index(rank)]


def _pieces(
    schedule: Schedule, rank: int, step: int, only: int | None = None
) -> list[Piece]:
    """Every piece that a rank needs at a step (from `only` one peer); `peer` is its origin."""
    out = []
    peers = range(schedule.size) if only is None else (only,)
    for slot, want in enumerate(schedule.want(rank, step)):
        if volume(want.box) == 0:
            continue
        holder = _holder(schedule, rank, step, slot, want)
        if holder is not None:
            if holder in peers:
                out.append(Piece(holder, slot, want.source, want.box, held=slot))
            continue
        for peer in peers:
            part = intersect(want.box, schedule.own(peer, want.source))
            if part is not None:
                out.append(Piece(peer, slot, want.source, part))
    return out


def _step(schedule: Schedule, rank: int, step: int) -> Step:
    mine = _pieces(schedule, rank, step)
    sends = []
    for peer in range(schedule.size):
        if peer == rank:
            continue
        for p in _pieces(schedule, peer, step, only=rank):
            sends.append(Piece(peer, p.slot, p.source, p.box, p.held))
    return Step(
        wants=schedule.want(rank, step),
        local=tuple(p for p in mine if p.peer == rank),
        recvs=tuple(p for p in mine if p.peer != rank),
        sends=tuple(sends),
    )


def plan(schedule: Schedule, rank: int, sources: int) -> Plan:
    """Derive one rank's sends and receives from a schedule.

    Args:
        schedule: the exchange.
        rank: the rank to plan for.
        sources: number of source tensors.

    Returns:
        The plan; its `adjoint` steps always follow the direct route (the gradient of a region goes
        straight back to its owner).

    Raises:
        ValueError: unknown route.

    Source: foldcp design, section 4.
    """
    if schedule.route not in ROUTES:
        raise ValueError(f"`route` must be one of {ROUTES}, got {schedule.route!r}")
    steps = tuple(_step(schedule, rank, t) for t in range(schedule.steps))
    adjoint = steps
    if schedule.route != "direct":
        straight = Schedule(schedule.size, schedule.steps, schedule.own, schedule.want)
        adjoint = tuple(_step(straight, rank, t) for t in range(schedule.steps))
    owned = tuple(schedule.own(rank, i) for i in range(sources))
    return Plan(rank, schedule.size, owned, steps, adjoint)


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
def triangle_attention_plan(
    layout: PairLayout, starting: bool, chunk: Span, route: str
) -> Plan:
    """Panels of k, v for a chunk of this rank's lines, and of the bias.

    Starting node: k, v over (chunk of rows_r, panel), bias over (cols_c, panel). Ending node: the
    transposed regions, lines being columns. `chunk` is relative to the tile.
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
        if starting:
            return Want(0, (lines(rank), k)), Want(1, (other, k))
        return Want(0, (k, lines(rank))), Want(1, (k, other))

    return plan(Schedule(layout.size, layout.panels, own, want, route), layout.rank, 2)


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


def boxes_plan(size: int, rank: int, own: tuple[Box, ...], want: tuple[Box, ...]) -> Plan:
    """One step, one source: rank i owns `own[i]` and wants `want[i]` (atoms, bands, halos)."""
    schedule = Schedule(size, 1, lambda r, _: own[r], lambda r, _: (Want(0, want[r]),))
    return plan(schedule, rank, 1)
