"""Move regions of tensors between ranks, with gradients.

`stream` is what rings use: it yields the regions of each step while the next step's transfer is
already under way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from foldcp.fabric.exchange.executor import Exchange
from foldcp.fabric.mesh import Mesh
from foldcp.fabric.transport.program import Dims, shape_over
from foldcp.layout.schedule import Plan
from foldcp_kernels.core.recompute import once

__all__ = ["Dims", "Exchange", "fetch", "scatter_add", "stream"]


class _Fetch(torch.autograd.Function):
    """All steps of an exchange as one node, so that every rank runs its backward exactly once."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, *sources: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        # A view of an input must not be returned as an output of the node.
        return tuple(x.clone() for held in exchange.run() for x in held)

    @staticmethod
    @once
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
    @once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        e = ctx.exchange
        sources = tuple(g.contiguous() for g in grads)
        again = Exchange(e.mesh, e.plan, sources, e.dims, e.label, e.wires)
        return None, *(x.clone() for held in again.run() for x in held)


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
        mesh: the mesh.
        plan: this rank's plan.
        label: name for the byte counters.
        sources: local tensors, one per source.
        dims: their dimensions that boxes refer to.
        wires: how each source travels, as of `Exchange`; None is all raw.

    Returns:
        An iterator over steps; each item has one tensor per want. With several steps and without
        gradients they are valid until the iterator is advanced.

    Source: docs/design/exchanges-and-transports.md.
    """
    exchange = Exchange(mesh, plan, sources, dims, label, wires)
    if torch.is_grad_enabled() and any(x.requires_grad for x in sources):
        flat = _Fetch.apply(exchange, *sources)  # type: ignore[no-untyped-call]
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
    """Fetch the regions of a one-step plan.

    Args:
        mesh: the mesh.
        plan: this rank's plan, of one step.
        sources: local tensors, one per source.
        dims: their dimensions that boxes refer to.
        label: name for the byte counters.
        wires: "raw" or "fp8" of each source; None: raw.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in sources):
        (out,) = tuple(stream(mesh, plan, sources, dims, label, wires))
        return out
    with Exchange(mesh, plan, sources, dims, label, wires) as exchange:
        exchange.start(0)
        return exchange.wait()


def scatter_add(
    mesh: Mesh, plan: Plan, regions: Sequence[Tensor], dims: Sequence[Dims], label: str
) -> tuple[Tensor, ...]:
    """Send regions of a one-step plan back to their owners, which add them up.

    Args:
        mesh: the mesh.
        plan: this rank's plan, of one step.
        regions: tensors to send, one per want of the plan.
        dims: their dimensions that boxes refer to.
        label: name for the byte counters.

    Returns:
        The sums, one per source of the plan.
    """
    like = [
        r.new_empty(shape_over(r.shape, d, box))
        for r, d, box in zip(regions, dims, plan.owned, strict=True)
    ]
    exchange = Exchange(mesh, plan, like, dims, label)
    if torch.is_grad_enabled() and any(r.requires_grad for r in regions):
        return tuple(_ScatterAdd.apply(exchange, *regions))  # type: ignore[no-untyped-call]
    return tuple(exchange.adjoint([tuple(regions)]))
