"""Execute a plan: move regions between ranks, one packed message per peer and step.

`stream` is what rings use: it yields the regions of each step while the next step's transfer is
already under way. Gradients flow back through the transposed plan, added up at the owners.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from foldcp.layout import Box
from foldcp.mesh import Mesh
from foldcp.schedule import Piece, Plan, Step

_ALIGN = 16  # bytes; lets a packed buffer hold pieces of several dtypes

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


def _bytes(like: Tensor, dims: Dims, box: Box) -> int:
    count = like.element_size()
    for n in _shape(like, dims, box):
        count *= n
    return count


class Exchange:
    """Runs one plan for one set of source tensors.

    Args:
        mesh: the mesh.
        plan: this rank's plan.
        sources: local tensors, one per source of the plan (they must not change before `wait`).
        dims: for each source, the tensor dimensions that its boxes refer to.
        label: name under which bytes are counted.
    """

    def __init__(
        self, mesh: Mesh, plan: Plan, sources: Sequence[Tensor], dims: Sequence[Dims], label: str
    ) -> None:
        self.mesh, self.plan, self.label = mesh, plan, label
        self.sources, self.dims = tuple(sources), tuple(dims)
        self._held: tuple[Tensor, ...] = ()
        self._held_wants: tuple[Any, ...] = ()
        self._pending: tuple[int, list[Any], dict[int, Tensor], list[Tensor]] | None = None

    def start(self, step: int) -> None:
        """Post the sends and receives of a step."""
        s = self.plan.steps[step]
        views = {p: self._view(p) for p in s.sends}
        self._pending = (step, *self._post(s.sends, s.recvs, views))

    def wait(self) -> tuple[Tensor, ...]:
        """The regions of the started step, one per want; they are views where nothing moved."""
        assert self._pending is not None
        step, works, inbox, _ = self._pending
        for w in works:
            w.wait()
        self._pending = None
        s = self.plan.steps[step]
        arrived = self._unpack(s.recvs, inbox)
        self._held = tuple(self._assemble(s, slot, arrived) for slot in range(len(s.wants)))
        self._held_wants = s.wants
        return self._held

    def _view(self, p: Piece) -> Tensor:
        dims = self.dims[p.source]
        if p.held >= 0:
            return _cut(self._held[p.held], dims, self._held_wants[p.held].box, p.box)
        return _cut(self.sources[p.source], dims, self.plan.owned[p.source], p.box)

    def _post(
        self, sends: Sequence[Piece], recvs: Sequence[Piece], views: dict[Piece, Tensor]
    ) -> tuple[list[Any], dict[int, Tensor], list[Tensor]]:
        ops, outbox, inbox = [], [], {}
        for peer in sorted({p.peer for p in sends}):
            buffer = _pack([views[p] for p in sends if p.peer == peer], self.mesh.device)
            self.mesh.sent[self.label] += buffer.numel()
            outbox.append(buffer)
            ops.append(self._op(dist.isend, buffer, peer))
        for peer in sorted({p.peer for p in recvs}):
            nbytes = 0
            for p in (p for p in recvs if p.peer == peer):
                nbytes = _align(nbytes) + _bytes(self.sources[p.source], self.dims[p.source], p.box)
            inbox[peer] = torch.empty(nbytes, dtype=torch.uint8, device=self.mesh.device)
            self.mesh.received[self.label] += nbytes
            ops.append(self._op(dist.irecv, inbox[peer], peer))
        return (dist.batch_isend_irecv(ops) if ops else []), inbox, outbox

    def _op(self, kind: Any, buffer: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(kind, buffer, self.mesh.global_rank(peer), self.mesh.group)

    def _unpack(self, recvs: Sequence[Piece], inbox: dict[int, Tensor]) -> dict[Piece, Tensor]:
        out, at = {}, dict.fromkeys(inbox, 0)
        for p in recvs:
            like, dims = self.sources[p.source], self.dims[p.source]
            lo = _align(at[p.peer])
            at[p.peer] = lo + _bytes(like, dims, p.box)
            raw = inbox[p.peer][lo : at[p.peer]]
            out[p] = raw.view(like.dtype).view(_shape(like, dims, p.box))
        return out

    def _assemble(self, s: Step, slot: int, arrived: dict[Piece, Tensor]) -> Tensor:
        want = s.wants[slot]
        like, dims = self.sources[want.source], self.dims[want.source]
        parts = [(p, self._view(p)) for p in s.local if p.slot == slot]
        parts += [(p, arrived[p]) for p in s.recvs if p.slot == slot]
        if len(parts) == 1 and parts[0][0].box == want.box:
            return parts[0][1]
        out = like.new_empty(_shape(like, dims, want.box))
        for p, x in parts:
            _cut(out, dims, want.box, p.box).copy_(x)
        return out

    def adjoint(self, regions: Sequence[Sequence[Tensor | None]]) -> list[Tensor]:
        """Send regions (one tuple per step) back to their owners and add them up there.

        Returns:
            One tensor per source, shaped like the source.
        """
        out = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in self.sources]
        for s, grads in zip(self.plan.adjoint, regions, strict=True):
            views = {}
            for p in (*s.local, *s.recvs):
                grad, want = grads[p.slot], s.wants[p.slot]
                like, dims = self.sources[p.source], self.dims[p.source]
                views[p] = (
                    like.new_zeros(_shape(like, dims, p.box))
                    if grad is None
                    else _cut(grad, dims, want.box, p.box)
                )
            # Roles swap: what was received is sent back, what was sent comes back.
            works, inbox, _keep = self._post(s.recvs, s.sends, views)
            for w in works:
                w.wait()
            back = self._unpack(s.sends, inbox)
            for p, x in [*((p, views[p]) for p in s.local), *back.items()]:
                _cut(out[p.source], self.dims[p.source], self.plan.owned[p.source], p.box).add_(x)
        return out


def _align(n: int) -> int:
    return -(-n // _ALIGN) * _ALIGN


def _pack(views: Sequence[Tensor], device: torch.device) -> Tensor:
    sizes, total = [], 0
    for v in views:
        lo = _align(total)
        total = lo + v.numel() * v.element_size()
        sizes.append((lo, total))
    buffer = torch.empty(total, dtype=torch.uint8, device=device)
    for v, (lo, hi) in zip(views, sizes, strict=True):
        buffer[lo:hi].view(v.dtype).view(v.shape).copy_(v)
    return buffer


class _Fetch(torch.autograd.Function):
    """All steps of an exchange as one node, so that every rank runs its backward exactly once."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, *sources: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        out: list[Tensor] = []
        for step in range(len(exchange.plan.steps)):
            exchange.start(step)
            # A view of an input must not be returned as an output of the node.
            out.extend(x.clone() for x in exchange.wait())
        return tuple(out)

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
        ctx.exchange.start(0)
        return None, *(x.clone() for x in ctx.exchange.wait())


def stream(
    mesh: Mesh, plan: Plan, sources: Sequence[Tensor], dims: Sequence[Dims], label: str
) -> Iterator[tuple[Tensor, ...]]:
    """Yield the regions of each step; the transfer of step t + 1 runs during the use of step t.

    Args:
        mesh: the mesh. plan: this rank's plan. label: name for the byte counters.
        sources: local tensors, one per source. dims: their dimensions that boxes refer to.

    Returns:
        An iterator over steps; each item has one tensor per want.

    Source: foldcp design, section 4.
    """
    exchange = Exchange(mesh, plan, sources, dims, label)
    if torch.is_grad_enabled() and any(x.requires_grad for x in sources):
        flat = _Fetch.apply(exchange, *sources)
        at = 0
        for s in plan.steps:
            yield flat[at : at + len(s.wants)]
            at += len(s.wants)
        return
    exchange.start(0)
    for step in range(len(plan.steps)):
        held = exchange.wait()
        if step + 1 < len(plan.steps):
            exchange.start(step + 1)
        yield held


def fetch(
    mesh: Mesh, plan: Plan, sources: Sequence[Tensor], dims: Sequence[Dims], label: str
) -> tuple[Tensor, ...]:
    """The regions of a one-step plan."""
    (out,) = tuple(stream(mesh, plan, sources, dims, label))
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
