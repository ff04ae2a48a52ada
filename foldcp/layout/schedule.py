"""Who sends what to whom at which step, derived from `(rank, step) -> region wanted`: no torch.

A schedule says which region (a box of a global tensor) each rank wants at each step, and which
box of each source tensor each rank owns. From that alone every rank derives its sends and
receives: intersect what a peer wants with what I own. `route="ring"` lets a rank take a region
from the peer that used it one step before instead of from its owner.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from foldcp.config import ROUTES
from foldcp.layout.tiles import Box


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
    sender takes it from what it received one step before (ring), not from its own tile. `origin`
    is what the sender holds of it, `region` what the receiver wants: both ends know in how many
    runs of memory it lies at either.
    """

    peer: int
    slot: int
    source: int
    box: Box
    held: int = -1
    origin: Box = ()
    region: Box = ()


@dataclass(frozen=True)
class Step:
    """What one rank does at one step."""

    wants: tuple[Want, ...]
    local: tuple[Piece, ...]
    recvs: tuple[Piece, ...]
    sends: tuple[Piece, ...]

    @cached_property
    def outgoing(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Messages to send: (peer, indices of its pieces in `sends`)."""
        return _by_peer(self.sends)

    @cached_property
    def incoming(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Messages to receive: (peer, indices of its pieces in `recvs`)."""
        return _by_peer(self.recvs)

    @cached_property
    def whole(self) -> frozenset[int]:
        """Slots whose region is a part of one of this rank's own sources: nothing moves."""
        return frozenset(
            p.slot for p in self.local if p.held < 0 and p.box == self.wants[p.slot].box
        )


def _by_peer(pieces: tuple[Piece, ...]) -> tuple[tuple[int, tuple[int, ...]], ...]:
    found: dict[int, list[int]] = {}
    for i, p in enumerate(pieces):
        found.setdefault(p.peer, []).append(i)
    return tuple((peer, tuple(indices)) for peer, indices in sorted(found.items()))


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


@dataclass(frozen=True, eq=False)
class Plan:
    """One rank's part of a schedule; `owned` is this rank's box of each source.

    `programs` keeps what `foldcp.fabric.transport.program` has made of it, by the tensors that it
    was made for.
    """

    rank: int
    size: int
    owned: tuple[Box, ...]
    steps: tuple[Step, ...]
    adjoint: tuple[Step, ...]
    programs: dict[Any, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def given(self) -> tuple[int, ...] | None:
        """Without peers: the sources that its wants are, None where they are parts or steps."""
        wants = self.steps[0].wants
        if self.size > 1 or len(self.steps) > 1:
            return None
        alike = all(w.box == self.owned[w.source] for w in wants)
        return tuple(w.source for w in wants) if alike else None

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


def _pieces(schedule: Schedule, rank: int, step: int, only: int | None = None) -> list[Piece]:
    """Every piece that a rank needs at a step (from `only` one peer); `peer` is its origin."""
    out = []
    peers = range(schedule.size) if only is None else (only,)
    for slot, want in enumerate(schedule.want(rank, step)):
        if volume(want.box) == 0:
            continue
        holder = _holder(schedule, rank, step, slot, want)
        if holder is not None:
            if holder in peers:
                box = want.box
                out.append(Piece(holder, slot, want.source, box, slot, origin=box, region=box))
            continue
        for peer in peers:
            own = schedule.own(peer, want.source)
            part = intersect(want.box, own)
            if part is not None:
                out.append(Piece(peer, slot, want.source, part, origin=own, region=want.box))
    return out


def _step(schedule: Schedule, rank: int, step: int) -> Step:
    mine = _pieces(schedule, rank, step)
    sends = []
    for peer in range(schedule.size):
        if peer == rank:
            continue
        for p in _pieces(schedule, peer, step, only=rank):
            sends.append(replace(p, peer=peer))
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

    Source: docs/design/layouts-and-schedules.md.
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


def boxes_plan(size: int, rank: int, own: tuple[Box, ...], want: tuple[Box, ...]) -> Plan:
    """One step, one source: rank i owns `own[i]` and wants `want[i]` (atoms, bands, halos)."""
    schedule = Schedule(size, 1, lambda r, _: own[r], lambda r, _: (Want(0, want[r]),))
    return plan(schedule, rank, 1)
