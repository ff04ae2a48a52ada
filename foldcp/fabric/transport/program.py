"""What an exchange does with memory, worked out once per plan and kind of tensors, then replayed.

A program names base tensors by number (the sources, then the memory that regions lie in) and every
piece by base, offset, sizes and strides. Replaying it takes the tensors alone.

A piece travels without being packed where it is one run of memory at both ends, or a few long ones.
How many follows from the boxes that both ends know and from the sizes of the tensor beside them,
never from the strides that a rank happens to have: what cannot be sent from where it lies is packed
there, and looks the same on the wire.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from foldcp.fabric.transport.wire import STAGING_ALIGN, Message, aligned, in_runs, part_bytes
from foldcp.layout.schedule import Piece, Plan, Step
from foldcp.layout.tiles import Box

REGION_ALIGN = 256  # bytes
# A piece of several runs is cut in one transfer each if they are this long and not too many: each
# costs about what packing half a megabyte does.
LEAST_RUN, MOST_RUNS = 256 << 10, 64

Dims = tuple[int, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """A strided view of a base tensor; strides and offset in elements."""

    base: int
    dtype: torch.dtype
    shape: Shape
    stride: Shape
    offset: int

    def cut(self, dims: Dims, origin: Box, box: Box) -> Place:
        """The part of it (whose `dims` start at `origin`) over `box`."""
        shape, offset = list(self.shape), self.offset
        for d, (lo, _), (a, b) in zip(dims, origin, box, strict=True):
            offset += (a - lo) * self.stride[d]
            shape[d] = b - a
        return Place(self.base, self.dtype, tuple(shape), self.stride, offset)

    def of(self, tensor: Tensor) -> Tensor:
        """The view of its base, a source or memory of regions."""
        if tensor.dtype is not self.dtype:
            tensor = tensor.view(self.dtype)
        return tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.offset)


@dataclass(frozen=True)
class Parcel:
    """A message of a program; fields as of `foldcp.fabric.transport.wire.Message`."""

    peer: int
    places: tuple[Place, ...]
    fp8: tuple[bool, ...]
    held: bool
    runs: int

    def bytes(self) -> int:
        """Bytes on the wire."""
        end = 0
        for p, fp8 in zip(self.places, self.fp8, strict=True):
            end = aligned(end) + part_bytes(prod(p.shape), p.dtype.itemsize, fp8)
        return end

    def direct(self) -> bool:
        """Whether it needs no packing here."""
        p = self.places[0]
        return len(self.places) == 1 and not self.fp8[0] and in_runs(p.shape, p.stride, self.runs)

    def of(self, bases: Sequence[Tensor | None]) -> Message:
        """The message with its tensors."""
        views = tuple(p.of(bases[p.base]) for p in self.places)  # type: ignore[arg-type]
        return Message(self.peer, views, self.fp8, self.held, self.runs)


@dataclass(frozen=True)
class Act:
    """One step of a program.

    Args:
        made: where each want comes together, None for one that is a part of a source.
        whole: the parts of sources that are wants, None for the others.
        local: (from, to) of what this rank copies itself.
        sends: messages to send.
        recvs: messages to receive.
        sent: bytes sent.
        received: bytes received.
        staged: bytes packed.
        forwards: it sends something that the step before has brought.
        layout: a number for `made`.
    """

    made: tuple[Place | None, ...]
    whole: tuple[Place | None, ...]
    local: tuple[tuple[Place, Place], ...]
    sends: tuple[Parcel, ...]
    recvs: tuple[Parcel, ...]
    sent: int
    received: int
    staged: int
    forwards: bool
    layout: int

    def messages(self, bases: Sequence[Tensor | None]) -> tuple[list[Message], list[Message]]:
        """Sends and receives with their tensors, for a transport that replays no programs."""
        return [p.of(bases) for p in self.sends], [p.of(bases) for p in self.recvs]


@dataclass(eq=False)
class Program:
    """An exchange of certain tensors.

    Args:
        acts: its steps.
        sources: number of them; bases beyond are regions: with one step a tensor per want, with
            several one buffer for the even and one for the odd steps.
        region_bytes: most bytes of a slot's regions.
        staging_bytes: most bytes of a slot's staging buffers.
        devices: of the sources.
        handles: what transports know it by.
    """

    acts: tuple[Act, ...]
    sources: int
    region_bytes: int
    staging_bytes: int
    devices: tuple[torch.device, ...]
    handles: dict[str, int] = field(default_factory=dict)

    def kept_by(self, owner: str, handle: int, drop: Any) -> int:
        """Remember what an owner knows it by, until the program is gone."""
        self.handles[owner] = handle
        weakref.finalize(self, drop, handle).atexit = False
        return handle

    def flat(self) -> list[int]:
        """All messages as numbers, as csrc/engine/program.h reads them."""
        out = [len(self.acts)]
        for act in self.acts:
            out += [act.forwards, len(act.sends) + len(act.recvs)]
            for send, parcels in ((1, act.sends), (0, act.recvs)):
                for m in parcels:
                    out += [send, m.peer, m.runs, len(m.places)]
                    for p, fp8 in zip(m.places, m.fp8, strict=True):
                        item = p.dtype.itemsize
                        out += [p.base, p.offset * item, item, _TYPES.get(p.dtype, 0), fp8]
                        out += [len(p.shape), *p.shape, *p.stride]
        return [int(x) for x in out]


# As in csrc/wire/view.h.
_TYPES = {torch.float64: 1, torch.float32: 2, torch.float16: 3, torch.bfloat16: 4}


def program(
    plan: Plan, sources: Sequence[Tensor], dims: tuple[Dims, ...], wires: tuple[str, ...]
) -> Program:
    """The program of a plan for tensors of these shapes, strides and types.

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


def contiguous(shape: Shape) -> Shape:
    """Strides of a tensor without gaps."""
    out = [1]
    for n in reversed(shape[1:]):
        out.append(out[-1] * n)
    return tuple(reversed(out[: len(shape)]))


def shape_over(like: Sequence[int], dims: Dims, box: Box) -> Shape:
    """The shape of a tensor with other boxes."""
    shape = list(like)
    for d, (lo, hi) in zip(dims, box, strict=True):
        shape[d] = max(0, hi - lo)
    return tuple(shape)


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
        """The program of all steps."""
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
