"""Assemble the program of a plan, once per kind of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

from foldcp.fabric.transport.program import (
    Act,
    Dims,
    Parcel,
    Place,
    Program,
    contiguous,
    shape_over,
)  # fmt: skip
from foldcp.fabric.transport.wire import STAGING_ALIGN, aligned
from foldcp.layout.schedule import Piece, Plan, Step
from foldcp.layout.tiles import Box

REGION_ALIGN = 256  # bytes
# A piece of several runs is cut in one transfer each if they are this long and not too many: each
# costs about what packing half a megabyte does.
LEAST_RUN, MOST_RUNS = 256 << 10, 64


def program(
    plan: Plan, sources: Sequence[Tensor], dims: tuple[Dims, ...], wires: tuple[str, ...]
) -> Program:
    """Return the program of a plan for tensors of these shapes, strides and types.

    Args:
        plan: this rank's plan.
        sources: as of `exchange.executor.Exchange`.
        dims: as of `exchange.executor.Exchange`.
        wires: as of `exchange.executor.Exchange`.
    """
    kinds = tuple([(x.shape, x.stride(), x.dtype, x.device) for x in sources])
    key = kinds, dims, wires, LEAST_RUN, MOST_RUNS
    found = plan.programs.get(key)
    if found is None:
        found = plan.programs[key] = _Maker(plan, sources, dims, wires).make()
    return found


class _Maker:
    def __init__(
        self, plan: Plan, sources: Sequence[Tensor], dims: tuple[Dims, ...], wires: tuple[str, ...]
    ) -> None:
        self.plan, self.dims, self.wires = plan, dims, wires
        self.devices = tuple(x.device for x in sources)
        self.sources = [
            Place(i, x.dtype, tuple(x.shape), x.stride(), 0) for i, x in enumerate(sources)
        ]
        self.single = len(plan.steps) == 1
        self.region_bytes = 0
        self.layouts: dict[tuple[Place | None, ...], int] = {}

    def make(self) -> Program:
        """Make the program of all steps."""
        acts: list[Act] = []
        held: tuple[Place | None, ...] = ()
        held_step: Step | None = None
        for number, step in enumerate(self.plan.steps):
            made = self._made(step, number)
            whole = tuple(
                None if m is not None else self._source(w.source, w.box)
                for m, w in zip(made, step.wants, strict=True)
            )
            regions = tuple(m or w for m, w in zip(made, whole, strict=True))
            acts.append(self._act(step, made, whole, regions, held, held_step))
            held, held_step = regions, step
        staging = max(a.staged for a in acts)
        return Program(tuple(acts), len(self.sources), self.region_bytes, staging, self.devices)

    def _source(self, source: int, box: Box) -> Place:
        return self.sources[source].cut(self.dims[source], self.plan.owned[source], box)

    def _made(self, step: Step, number: int) -> tuple[Place | None, ...]:
        out: list[Place | None] = []
        end = 0
        for slot, want in enumerate(step.wants):
            if slot in step.whole:
                out.append(None)
                continue
            like = self.sources[want.source]
            shape = shape_over(like.shape, self.dims[want.source], want.box)
            base = len(self.sources) + (slot if self.single else number % 2)
            offset = 0 if self.single else end // like.dtype.itemsize
            out.append(Place(base, like.dtype, shape, contiguous(shape), offset))
            end = aligned(end + prod(shape) * like.dtype.itemsize, REGION_ALIGN)
        self.region_bytes = max(self.region_bytes, end)
        return tuple(out)

    def _act(
        self,
        step: Step,
        made: tuple[Place | None, ...],
        whole: tuple[Place | None, ...],
        regions: tuple[Place | None, ...],
        held: tuple[Place | None, ...],
        held_step: Step | None,
    ) -> Act:
        def sent(p: Piece) -> Place:
            if p.held < 0:
                return self._source(p.source, p.box)
            region, box = held[p.held], held_step.wants[p.held].box  # type: ignore[union-attr]
            return region.cut(self.dims[p.source], box, p.box)  # type: ignore[union-attr]

        def got(p: Piece) -> Place:
            region = regions[p.slot]
            return region.cut(self.dims[p.source], step.wants[p.slot].box, p.box)  # type: ignore[union-attr]

        local = tuple((sent(p), got(p)) for p in step.local if made[p.slot] is not None)
        sends = self._parcels(step.outgoing, step.sends, [sent(p) for p in step.sends])
        recvs = self._parcels(step.incoming, step.recvs, [got(p) for p in step.recvs])
        staged = sum(aligned(m.bytes(), STAGING_ALIGN) for m in (*sends, *recvs) if not m.direct())
        sent_bytes, received_bytes = (sum(m.bytes() for m in way) for way in (sends, recvs))
        forwards = any(m.held for m in sends)
        layout = self.layouts.setdefault(made, len(self.layouts))
        return Act(
            made, whole, local, sends, recvs, sent_bytes, received_bytes, staged, forwards, layout
        )

    def _parcels(
        self,
        by_peer: Sequence[tuple[int, tuple[int, ...]]],
        pieces: Sequence[Piece],
        places: Sequence[Place],
    ) -> tuple[Parcel, ...]:
        """The messages with each peer: what must be packed in one, then every other piece."""
        out = []
        for peer, found in by_peer:
            packed = []
            alone = []
            for i in found:
                runs = self._runs(pieces[i], places[i])
                packed.append(i) if runs == 0 else alone.append(([i], runs))
            for group, runs in ([(packed, 1)] if packed else []) + alone:
                fp8 = tuple(self.wires[pieces[i].source] != "raw" for i in group)
                held = any(pieces[i].held >= 0 for i in group)
                out.append(Parcel(peer, tuple(places[i] for i in group), fp8, held, runs))
        return tuple(out)

    def _runs(self, p: Piece, place: Place) -> int:
        """Transfers that a piece is cut in, 0 where it is to be packed; alike at both ends."""
        if self.wires[p.source] != "raw":
            return 0
        cut = 0  # dimensions outside the runs
        for d, box, *ends in zip(self.dims[p.source], p.box, p.origin, p.region, strict=True):
            if any(end != box for end in ends):
                cut = max(cut, d)
        runs, each = prod(place.shape[:cut]), prod(place.shape[cut:]) * place.dtype.itemsize
        if runs <= 1 or (each >= LEAST_RUN and runs <= MOST_RUNS):
            return runs
        # A long piece is a message of its own: one end at least may have it in one stretch.
        return int(runs * each >= LEAST_RUN)
