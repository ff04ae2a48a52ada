"""Derive the messages of every step from `(rank, step) -> region wanted`; imports no torch.

A schedule says which region (a box of a global tensor) each rank wants at each step, and which
box of each source tensor each rank owns. From that alone every rank derives its sends and
receives: intersect what a peer wants with what I own. `route="ring"` lets a rank take a region
from the peer that used it one step before instead of from its owner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from foldcp.config import ROUTES
from foldcp.layout.boxes import Owners, intersect, volume
from foldcp.layout.tiles import Box, Span


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
    """Messages, copies and views of one rank at one step."""

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
    schedule: Schedule
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
        """Return (sent, received) elements per channel, of one step or of all."""
        steps = self.steps if step is None else (self.steps[step],)
        sent = sum(volume(p.box) for s in steps for p in s.sends)
        return sent, sum(volume(p.box) for s in steps for p in s.recvs)


Holders = dict[tuple[int, int], int]


def holders(before: Sequence[tuple[Want, ...]], now: Sequence[tuple[Want, ...]]) -> Holders:
    """Pair each (rank, slot) with the rank that wanted the same region one step before.

    One user per receiver: the k-th rank that wants a region takes it from the k-th user. Where
    there are fewer users than receivers, all take it from its owner.

    Args:
        before: wants of every rank at the step before.
        now: wants of every rank.
    """
    users: dict[tuple[int, Want], list[int]] = {}
    takers: dict[tuple[int, Want], list[int]] = {}
    for found, wants in ((users, before), (takers, now)):
        for rank, mine in enumerate(wants):
            for slot, want in enumerate(mine):
                found.setdefault((slot, want), []).append(rank)
    return {
        (taker, slot): user
        for (slot, want), who in takers.items()
        if len(users.get((slot, want), ())) >= len(who)
        for taker, user in zip(who, users[slot, want], strict=False)
    }


def _step(
    rank: int, wants: Sequence[tuple[Want, ...]], owners: Sequence[Owners], held: Holders
) -> Step:
    """Derive a rank's part of one step from the wants of every rank."""
    mine: list[Piece] = []
    sends: list[Piece] = []
    for taker, its in enumerate(wants):
        for slot, want in enumerate(its):
            box = want.box
            holder = held.get((taker, slot))
            if holder is not None:
                if rank in (taker, holder) and volume(box):
                    found, peer = (mine, holder) if taker == rank else (sends, taker)
                    found.append(Piece(peer, slot, want.source, box, slot, origin=box, region=box))
                continue
            if taker == rank:
                for peer, part in owners[want.source].parts(box):
                    own = owners[want.source].boxes[peer]
                    mine.append(Piece(peer, slot, want.source, part, origin=own, region=box))
                continue
            own = owners[want.source].boxes[rank]
            common = intersect(box, own)
            if common is not None:
                sends.append(Piece(taker, slot, want.source, common, origin=own, region=box))
    return Step(
        wants=wants[rank],
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
    ranks = range(schedule.size)
    owners = [Owners([schedule.own(r, i) for r in ranks]) for i in range(sources)]
    wants = [[schedule.want(r, t) for r in ranks] for t in range(schedule.steps)]
    direct = tuple(_step(rank, now, owners, {}) for now in wants)
    steps = direct
    if schedule.route == "ring":
        held = [{}, *(holders(a, b) for a, b in pairwise(wants))]
        steps = tuple(_step(rank, now, owners, h) for now, h in zip(wants, held, strict=True))
    owned = tuple(owner.boxes[rank] for owner in owners)
    return Plan(rank, schedule.size, owned, steps, direct, schedule)


def in_parts(whole: Plan, spans: Sequence[Span]) -> Plan:
    """Cut every region of a plan along its first dimension; each part is a step of its own.

    All steps of one part come before those of the next.

    Args:
        whole: its regions span the whole first dimension.
        spans: of the first dimension.
    """
    if len(spans) == 1:
        return whole
    schedule = whole.schedule

    def want(rank: int, step: int) -> tuple[Want, ...]:
        part, at = divmod(step, schedule.steps)
        return tuple(Want(w.source, _cut(w.box, spans[part])) for w in schedule.want(rank, at))

    def cut(step: Step, span: Span) -> Step:
        return Step(
            tuple(Want(w.source, _cut(w.box, span)) for w in step.wants),
            *(tuple(_part(p, span) for p in ps) for ps in (step.local, step.recvs, step.sends)),
        )

    steps, adjoint = (
        tuple(cut(step, span) for span in spans for step in found)
        for found in (whole.steps, whole.adjoint)
    )
    parts = replace(schedule, steps=len(spans) * schedule.steps, want=want)
    return Plan(whole.rank, whole.size, whole.owned, steps, adjoint, parts)


def _cut(box: Box, span: Span) -> Box:
    return (span, *box[1:]) if box else box


def _part(piece: Piece, span: Span) -> Piece:
    origin = piece.origin if piece.held < 0 else _cut(piece.origin, span)
    box, region = _cut(piece.box, span), _cut(piece.region, span)
    return replace(piece, box=box, origin=origin, region=region)


def boxes_plan(size: int, rank: int, own: tuple[Box, ...], want: tuple[Box, ...]) -> Plan:
    """Plan one step of one source: rank i owns `own[i]` and wants `want[i]`.

    Args:
        size: number of ranks.
        rank: this rank.
        own: box that each rank owns.
        want: box that each rank wants (atoms, bands, halos).
    """
    schedule = Schedule(size, 1, lambda r, _: own[r], lambda r, _: (Want(0, want[r]),))
    return plan(schedule, rank, 1)
