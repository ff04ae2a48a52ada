"""Execute a plan: move regions between ranks, one packed message per peer and step.

`stream` is what rings use: it yields the regions of each step while the next step's transfer is
already under way. Gradients flow back through the transposed plan, added up at the owners. How
messages travel is the business of the mesh's transport.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from foldcp import timeline, under_way
from foldcp.layout import Box
from foldcp.mesh import Mesh
from foldcp.native import tag
from foldcp.schedule import Piece, Plan, Step
from foldcp.transport import Flight
from foldcp.wire import Message, aligned, staging_bytes

_ADJOINT = 1 << 15  # steps of gradients are numbered from here
_REGION_ALIGN = 256  # bytes

Dims = tuple[int, ...]


def _cut(x: Tensor, dims: Dims, origin: Box, box: Box) -> Tensor:
    """The view of `x` (whose `dims` start at `origin`) over `box`."""
    for d, (lo, _), (a, b) in zip(dims, origin, box, strict=True):
        if a - lo != 0 or b - a != x.shape[d]:
            x = x.narrow(d, a - lo, b - a)
    return x


def _shape(like: Tensor, dims: Dims, box: Box) -> list[int]:
    shape = list(like.shape)
    for d, (lo, hi) in zip(dims, box, strict=True):
        shape[d] = max(0, hi - lo)
    return shape


class Exchange:
    """Runs one plan for one set of source tensors; a context manager that ends what is under way.

    Args:
        mesh: the mesh.
        plan: this rank's plan.
        sources: local tensors, one per source of the plan (they must not change before `wait`).
        dims: for each source, the tensor dimensions that its boxes refer to.
        label: name under which bytes are counted.
        wires: for each source "raw" or "fp8", how it travels; None is all raw.

    Raises:
        ValueError: a source is on another device than the mesh, or does not fit the plan. The other
            ranks are told where the transport can tell them.
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
        self.sources, self.dims = tuple(x.detach() for x in sources), tuple(dims)
        self.wires = tuple(wires) if wires is not None else ("raw",) * len(self.sources)
        self._check()
        self._flight: Flight | None = None
        self._buffers: dict[tuple[str, int], Tensor] = {}
        self._held: tuple[Tensor, ...] = ()
        self._held_wants: tuple[Any, ...] = ()
        self._pending: tuple[int, list[Tensor | None]] | None = None

    def _check(self) -> None:
        for i, (x, dims) in enumerate(zip(self.sources, self.dims, strict=True)):
            if x.device.type != self.mesh.device.type:
                self.mesh.refuse(
                    f"source {i} of the exchange {self.label!r} is on {x.device}, but the mesh is "
                    f"on {self.mesh.device}: move it there"
                )
            expected = _shape(x, dims, self.plan.owned[i])
            if list(x.shape) != expected:
                self.mesh.refuse(
                    f"source {i} of the exchange {self.label!r} is {list(x.shape)}; its plan "
                    f"expects {expected}"
                )

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None or kind is GeneratorExit:
            self.close()
        elif self._flight is not None:
            under_way.broken.append(self)

    def start(self, step: int) -> None:
        """Post the sends and receives of a step, after `wait` of the one before."""
        assert self._pending is None
        s = self.plan.steps[step]
        regions = self._regions(s, step)
        sends = self._messages(s.outgoing, s.sends, [self._view(p) for p in s.sends])
        parts = [self._part(s, regions, p) for p in s.recvs]
        recvs = self._messages(s.incoming, s.recvs, parts)
        self._post(step % 2, sends, recvs, tag(self.label, step))
        self._pending = step, regions

    def wait(self) -> tuple[Tensor, ...]:
        """The regions of the started step, one per want; they are views where nothing moved.

        With several steps they live in two buffers in turn: they are valid until the step after the
        next is started.
        """
        assert self._pending is not None
        step, regions = self._pending
        self._pending = None
        s = self.plan.steps[step]
        if self._flight is not None:
            under_way.waiting = True
            self._flight.arrive(step % 2)
            under_way.waiting = False
        local = [(p, self._view(p)) for p in s.local]
        for p, x in local:
            if regions[p.slot] is not None:
                self._part(s, regions, p).copy_(x)
        for p, x in local:
            if regions[p.slot] is None:
                regions[p.slot] = x
        self._held, self._held_wants = tuple(regions), s.wants  # type: ignore[arg-type]
        return self._held

    def run(self) -> Iterator[tuple[Tensor, ...]]:
        """The regions of all steps; the next step is under way while those of one are used."""
        steps = len(self.plan.steps)
        with self:
            self.start(0)
            for step in range(steps):
                held = self.wait()
                if step + 1 < steps:
                    self.start(step + 1)
                with timeline.math(self.label, step):
                    yield held

    def close(self) -> None:
        """Let everything land and give the buffers back; regions of several steps are gone then."""
        if self._flight is not None:
            self._flight.land()
        self._flight = None
        while self._buffers:
            self.mesh.pool.give(self._buffers.popitem()[1])

    def _post(self, slot: int, sends: list[Message], recvs: list[Message], number: int) -> None:
        if not sends and not recvs:
            return
        link = self.mesh.link
        assert link is not None
        if self._flight is None:
            self._flight = link.flight()
        self.mesh.sent[self.label] += sum(m.bytes() for m in sends)
        self.mesh.received[self.label] += sum(m.bytes() for m in recvs)
        need = staging_bytes([*sends, *recvs]) if link.staged else 0
        self._flight.post(slot, sends, recvs, number, self._buffer("staging", slot, need))

    def _buffer(self, use: str, slot: int, count: int) -> Tensor:
        """The buffer of a slot, a larger one in its place where it is too small."""
        held = self._buffers.get((use, slot))
        if held is None or held.numel() < count:
            if held is not None:
                self.mesh.pool.give(held)
            held = self._buffers[use, slot] = self.mesh.pool.take(count)
        return held

    def _view(self, p: Piece) -> Tensor:
        dims = self.dims[p.source]
        if p.held >= 0:
            return _cut(self._held[p.held], dims, self._held_wants[p.held].box, p.box)
        return _cut(self.sources[p.source], dims, self.plan.owned[p.source], p.box)

    def _part(self, s: Step, regions: list[Tensor | None], p: Piece) -> Tensor:
        region = regions[p.slot]
        assert region is not None
        return _cut(region, self.dims[p.source], s.wants[p.slot].box, p.box)

    def _regions(self, s: Step, step: int) -> list[Tensor | None]:
        """Where the wants of a step come together; None for one that is a view of a source."""
        whole = s.whole
        shapes = [_shape(self.sources[w.source], self.dims[w.source], w.box) for w in s.wants]
        likes = [self.sources[w.source] for w in s.wants]
        if len(self.plan.steps) == 1:
            pairs = enumerate(zip(likes, shapes, strict=True))
            return [None if i in whole else like.new_empty(shape) for i, (like, shape) in pairs]
        spans, total = [], 0
        for i, (like, shape) in enumerate(zip(likes, shapes, strict=True)):
            size = 0 if i in whole else torch.Size(shape).numel() * like.element_size()
            spans.append((total, total + size))
            total = aligned(total + size, _REGION_ALIGN)
        buffer = self._buffer("regions", step % 2, total)
        return [
            None if i in whole else buffer[lo:hi].view(like.dtype).view(shape)
            for i, ((lo, hi), like, shape) in enumerate(zip(spans, likes, shapes, strict=True))
        ]

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
            back = [x.new_empty(_shape(x, self.dims[p.source], p.box)) for p, x in like.items()]
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
            return like.new_zeros(_shape(like, dims, p.box))
        return _cut(grad, dims, s.wants[p.slot].box, p.box)

    def _add(self, out: Sequence[Tensor], parts: Sequence[tuple[Piece, Tensor]]) -> None:
        for p, x in parts:
            _cut(out[p.source], self.dims[p.source], self.plan.owned[p.source], p.box).add_(x)


class _Fetch(torch.autograd.Function):
    """All steps of an exchange as one node, so that every rank runs its backward exactly once."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, *sources: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        # A view of an input must not be returned as an output of the node.
        return tuple(x.clone() for held in exchange.run() for x in held)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        regions, at = [], 0
        for s in ctx.exchange.plan.adjoint:
            regions.append(grads[at : at + len(s.wants)])
            at += len(s.wants)
        return None, *ctx.exchange.adjoint(regions)


class _ScatterAdd(torch.autograd.Function):
    """The transposed exchange of a one-step plan; its backward is the exchange itself."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, *regions: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return tuple(exchange.adjoint([regions]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        ctx.exchange.sources = tuple(g.contiguous() for g in grads)
        return None, *(x.clone() for held in ctx.exchange.run() for x in held)


def stream(
    mesh: Mesh,
    plan: Plan,
    sources: Sequence[Tensor],
    dims: Sequence[Dims],
    label: str,
    wires: Sequence[str] | None = None,
) -> Iterator[tuple[Tensor, ...]]:
    """Yield the regions of each step; the transfer of step t + 1 runs during the use of step t.

    Args:
        mesh: the mesh. plan: this rank's plan. label: name for the byte counters.
        sources: local tensors, one per source. dims: their dimensions that boxes refer to.
        wires: how each source travels, "raw" or "fp8"; None is all raw.

    Returns:
        An iterator over steps; each item has one tensor per want. With several steps and without
        gradients they are valid until the iterator is advanced.

    Source: foldcp design, section 4.
    """
    exchange = Exchange(mesh, plan, sources, dims, label, wires)
    if torch.is_grad_enabled() and any(x.requires_grad for x in sources):
        flat = _Fetch.apply(exchange, *sources)
        at = 0
        for s in plan.steps:
            yield flat[at : at + len(s.wants)]
            at += len(s.wants)
        return
    yield from exchange.run()


def fetch(
    mesh: Mesh,
    plan: Plan,
    sources: Sequence[Tensor],
    dims: Sequence[Dims],
    label: str,
    wires: Sequence[str] | None = None,
) -> tuple[Tensor, ...]:
    """The regions of a one-step plan."""
    (out,) = tuple(stream(mesh, plan, sources, dims, label, wires))
    return out


def scatter_add(
    mesh: Mesh, plan: Plan, regions: Sequence[Tensor], dims: Sequence[Dims], label: str
) -> tuple[Tensor, ...]:
    """Send regions of a one-step plan back to their owners, which add them up."""
    like = [
        r.new_empty(_shape(r, d, box)) for r, d, box in zip(regions, dims, plan.owned, strict=True)
    ]
    exchange = Exchange(mesh, plan, like, dims, label)
    if torch.is_grad_enabled() and any(r.requires_grad for r in regions):
        return _ScatterAdd.apply(exchange, *regions)
    return tuple(exchange.adjoint([tuple(regions)]))
