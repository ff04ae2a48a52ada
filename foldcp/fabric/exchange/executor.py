"""Execute a plan: move regions between ranks.

What goes where is replayed from the program of the plan (`foldcp.fabric.transport.program`).
Gradients go back through the transposed plan, one message per peer and step, and are added up at
the owners. How messages travel is the business of the mesh's transport.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from foldcp.fabric.exchange import timeline
from foldcp.fabric.mesh import Mesh
from foldcp.fabric.transport.assembler import program
from foldcp.fabric.transport.base import Exchanges, Flight
from foldcp.fabric.transport.engine_transport import tag
from foldcp.fabric.transport.program import Act, Dims, Place, shape_over
from foldcp.fabric.transport.wire import Message, staging_bytes
from foldcp.layout.schedule import Piece, Plan, Step
from foldcp.layout.tiles import Box

_ADJOINT = 1 << 15  # steps of gradients are numbered from here


def _cut(x: Tensor, dims: Dims, origin: Box, box: Box) -> Tensor:
    """The view of `x` (whose `dims` start at `origin`) over `box`."""
    for d, (lo, _), (a, b) in zip(dims, origin, box, strict=True):
        if a - lo != 0 or b - a != x.shape[d]:
            x = x.narrow(d, a - lo, b - a)
    return x


def _fits(x: Tensor, dims: Dims, owned: Box) -> bool:
    shape = x.shape
    for d, (lo, hi) in zip(dims, owned, strict=True):
        if shape[d] != hi - lo and hi > lo or shape[d] and hi <= lo:
            return False
    return True


class Exchange:
    """Runs one plan for one set of source tensors; a context manager that ends its transfers.

    Args:
        mesh: the mesh.
        plan: this rank's plan.
        sources: local tensors, one per source of the plan (they must not change before `wait`).
        dims: for each source, the tensor dimensions that its boxes refer to.
        label: name under which bytes are counted.
        wires: for each source "raw", "fp8" or `wire.FP8_THERE`, how it travels; None is all raw.

    Raises:
        ValueError: a source is on another device than the mesh, or does not fit the plan. The other
            ranks raise, too, if the transport can reach them.
    """

    def __init__(
        self,
        mesh: Mesh,
        plan: Plan,
        sources: Sequence[Tensor],
        dims: Sequence[Dims],
        label: str,
        wires: Sequence[str] | None = None,
    ) -> None:
        self.mesh, self.plan, self.label = mesh, plan, label
        self.sources = tuple([x.detach() if x.requires_grad else x for x in sources])
        self.dims = tuple(dims)
        self.wires = tuple(wires) if wires is not None else ("raw",) * len(self.sources)
        kind = mesh.device.type
        for x, expected, d in zip(self.sources, plan.owned, self.dims, strict=True):
            if x.device.type != kind or not _fits(x, d, expected):
                self._refuse()
        self._program = program(plan, self.sources, self.dims, self.wires)
        self._single = len(plan.steps) == 1
        self._bases: list[Tensor | None] = [*self.sources, None, None]
        self._made: dict[int, list[Tensor | None]] = {}  # by the layout of a step
        self._flight: Flight | None = None
        self._link: Exchanges  # from when there is a flight
        self._buffers: dict[tuple[str, int], Tensor] = {}
        self._pending: tuple[int, list[Tensor | None]] | None = None

    def _refuse(self) -> None:
        for i, (x, dims) in enumerate(zip(self.sources, self.dims, strict=True)):
            if x.device.type != self.mesh.device.type:
                self.mesh.refuse(
                    f"source {i} of the exchange {self.label!r} is on {x.device}, but the mesh is "
                    f"on {self.mesh.device}: move it there"
                )
            expected = shape_over(x.shape, dims, self.plan.owned[i])
            if tuple(x.shape) != expected:
                self.mesh.refuse(
                    f"source {i} of the exchange {self.label!r} is {list(x.shape)}; its plan "
                    f"expects {list(expected)}"
                )

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None or kind is GeneratorExit:
            self.close()
        elif self._flight is not None:
            self._link.broken.append(self)

    def start(self, step: int) -> None:
        """Post the sends and receives of a step, after `wait` of the one before."""
        assert self._pending is None
        act = self._program.acts[step]
        regions = self._regions(act, step % 2)
        if act.sends or act.recvs:
            self._replay(act, step)
        self._pending = step, regions

    def wait(self) -> tuple[Tensor, ...]:
        """Wait for the started step; returns one region per want, views where nothing moved.

        With several steps they live in two buffers in turn: they are valid until the step after the
        next is started.
        """
        assert self._pending is not None
        step, regions = self._pending
        self._pending = None
        act = self._program.acts[step]
        if self._flight is not None:
            self._link.waiting = True
            self._flight.arrive(step % 2)
            self._link.waiting = False
        for x, to in act.local:
            to.of(self._bases[to.base]).copy_(x.of(self._bases[x.base]))  # type: ignore[arg-type]
        out = [regions[i] if w is None else self._whole(w) for i, w in enumerate(act.whole)]
        return tuple(out)  # type: ignore[arg-type]

    def run(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield the regions of every step; the next step is in flight while one's are used."""
        steps = len(self.plan.steps)
        with self:
            self.start(0)
            for step in range(steps):
                held = self.wait()
                if step + 1 < steps:
                    self.start(step + 1)
                with timeline.math(self.mesh, self.label, step):
                    yield held

    def close(self) -> None:
        """Wait for all transfers and return the buffers; multi-step regions become invalid."""
        if self._flight is not None:
            self._flight.land()
        self._flight = None
        self._made.clear()
        while self._buffers:
            self.mesh.pool.give(self._buffers.popitem()[1])

    def _open(self) -> Flight:
        if self._flight is None:
            assert self.mesh.link is not None
            self._flight, self._link = self.mesh.link.flight(), self.mesh.link.exchanges
        return self._flight

    def _replay(self, act: Act, step: int) -> None:
        mesh, staging = self.mesh, None
        flight = self._open()
        mesh.traffic.sent[self.label] += act.sent
        mesh.traffic.received[self.label] += act.received
        if act.staged:
            mesh.traffic.staged[self.label] += act.staged
            if mesh.link.staged:  # type: ignore[union-attr]
                staging = self._buffer("staging", step % 2, self._program.staging_bytes)
        flight.replay(step % 2, self._program, step, self._bases, tag(self.label, step), staging)

    def _post(self, slot: int, sends: list[Message], recvs: list[Message], number: int) -> None:
        if not sends and not recvs:
            return
        flight = self._open()
        self.mesh.traffic.sent[self.label] += sum(m.bytes() for m in sends)
        self.mesh.traffic.received[self.label] += sum(m.bytes() for m in recvs)
        need = staging_bytes([*sends, *recvs])
        self.mesh.traffic.staged[self.label] += need
        need *= self.mesh.link.staged  # type: ignore[union-attr]
        flight.post(slot, sends, recvs, number, self._buffer("staging", slot, need))

    def _buffer(self, use: str, slot: int, count: int) -> Tensor:
        """The buffer of a slot, a larger one in its place where it is too small."""
        held = self._buffers.get((use, slot))
        if held is None or held.numel() < count:
            if held is not None:
                self.mesh.pool.give(held)
            held = self._buffers[use, slot] = self.mesh.pool.take(count)
        return held

    def _whole(self, place: Place) -> Tensor:
        x = self.sources[place.base]
        return x if place.shape == x.shape else place.of(x)

    def _regions(self, act: Act, slot: int) -> list[Tensor | None]:
        """Allocate regions for the wants of a step; None for one that is a view of a source."""
        if self._single:
            made: list[Tensor | None] = [
                None if p is None else self.sources[w.source].new_empty(p.shape)
                for p, w in zip(act.made, self.plan.steps[0].wants, strict=True)
            ]
            self._bases = [*self.sources, *made]
            return made
        at = len(self.sources) + slot
        if self._bases[at] is None:
            self._bases[at] = self._buffer("regions", slot, self._program.region_bytes)
        found = self._made.get(act.layout)
        if found is None:
            buffer = self._bases[at]
            found = [None if p is None else p.of(buffer) for p in act.made]  # type: ignore[arg-type]
            self._made[act.layout] = found
        return found

    def _messages(
        self,
        by_peer: Sequence[tuple[int, tuple[int, ...]]],
        pieces: Sequence[Piece],
        views: Sequence[Tensor],
    ) -> list[Message]:
        """One message per peer, its pieces in the order of the plan."""
        return [
            Message(
                peer,
                tuple(views[i] for i in found),
                tuple(self.wires[pieces[i].source] == "fp8" for i in found),
                any(pieces[i].held >= 0 for i in found),
            )
            for peer, found in by_peer
        ]

    def adjoint(self, regions: Sequence[Sequence[Tensor | None]]) -> list[Tensor]:
        """Send regions (one tuple per step) back to their owners and add them up there.

        Returns:
            One tensor per source, shaped like the source.
        """
        out = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in self.sources]
        under_way: list[tuple[Piece, Tensor]] = []
        for step, (s, grads) in enumerate(zip(self.plan.adjoint, regions, strict=True)):
            views = {p: self._gradient(s, grads, p) for p in (*s.local, *s.recvs)}
            like = {p: self.sources[p.source] for p in s.sends}
            back = [
                x.new_empty(shape_over(x.shape, self.dims[p.source], p.box))
                for p, x in like.items()
            ]
            if self._flight is not None and step > 0:
                self._flight.arrive((step - 1) % 2)
            # Roles swap: what was received is sent back, what was sent comes back.
            sends = self._messages(s.incoming, s.recvs, [views[p] for p in s.recvs])
            recvs = self._messages(s.outgoing, s.sends, back)
            self._post(step % 2, sends, recvs, tag(self.label, _ADJOINT + step))
            self._add(out, [*under_way, *((p, views[p]) for p in s.local)])
            under_way = list(zip(s.sends, back, strict=True))
        self.close()
        self._add(out, under_way)
        return out

    def _gradient(self, s: Step, grads: Sequence[Tensor | None], p: Piece) -> Tensor:
        grad, like, dims = grads[p.slot], self.sources[p.source], self.dims[p.source]
        if grad is None:
            return like.new_zeros(shape_over(like.shape, dims, p.box))
        return _cut(grad, dims, s.wants[p.slot].box, p.box)

    def _add(self, out: Sequence[Tensor], parts: Sequence[tuple[Piece, Tensor]]) -> None:
        for p, x in parts:
            _cut(out[p.source], self.dims[p.source], self.plan.owned[p.source], p.box).add_(x)
