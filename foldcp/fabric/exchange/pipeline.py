"""Run a sequence of exchanges whose source tensors are produced lazily.

`chained` goes through the steps of exchanges with several: the first step of the next is posted
before the last of one is used, so that only the first transfer of all has no math to run under.

Two orders of one-step exchanges; make: the math inside `moves`, use: the caller's. `ahead` posts
the next exchange before the regions of one are used, `behind` waits for one only when the sources
of the next are made:

    ahead     make 0, post 0; wait 0, make 1, post 1, use 0; wait 1, make 2, post 2, use 1; ...
    behind    make 0, post 0; make 1, wait 0, post 1, use 0; make 2, wait 1, post 2, use 1; ...

With the products of what `ahead` brings as the sources of `behind`, transfers in both directions
run under each product.

Backward: each exchange is a node of its own; all ranks run the nodes in the reverse order of these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from foldcp.fabric.exchange import timeline
from foldcp.fabric.exchange.autograd import Dims, Exchange, fetch, stream
from foldcp.fabric.mesh import Mesh
from foldcp.layout.schedule import Plan

Made = TypeVar("Made")
Move = tuple[Plan, tuple[Tensor, ...]]
Regions = tuple[Tensor, ...]


def chained(
    mesh: Mesh,
    moves: Iterator[tuple[Made, Plan, tuple[Tensor, ...]]],
    dims: Sequence[Dims],
    label: str,
    wires: Sequence[str],
) -> Iterator[tuple[Made, int, Regions]]:
    """Run exchanges of several steps one after the other.

    Args:
        mesh: the mesh.
        moves: what the loop needs beside the regions, plan and sources of each exchange, made when
            asked for; the sources of two exist at the last step of one.
        dims: as of `foldcp.fabric.exchange.autograd.stream`, the same for all.
        label: as of `foldcp.fabric.exchange.autograd.stream`, the same for all.
        wires: as of `foldcp.fabric.exchange.autograd.stream`, the same for all.

    Returns:
        An iterator over (what came with the move, step, one tensor per want), valid until it is
        advanced. With gradients on, no exchange runs ahead.

    Source: docs/design/exchanges-and-transports.md.
    """
    if torch.is_grad_enabled() or mesh.size == 1:
        for made, plan, sources in moves:
            if plan.given is not None and not torch.is_grad_enabled():
                yield made, 0, tuple(sources[i] for i in plan.given)
                del made, sources
                continue
            for step, held in enumerate(stream(mesh, plan, sources, dims, label, wires)):
                yield made, step, held
                del held
            del made, sources
        return

    def begin() -> tuple[Made, Exchange] | None:
        move = next(moves, None)
        if move is None:
            return None
        made, plan, sources = move
        exchange = Exchange(mesh, plan, sources, dims, label, wires)
        exchange.start(0)
        return made, exchange

    following = begin()
    while following is not None:
        (made, exchange), following = following, None
        with exchange:
            for step in range(1, len(exchange.plan.steps) + 1):
                held = exchange.wait()
                if step < len(exchange.plan.steps):
                    exchange.start(step)
                else:
                    following = begin()
                with timeline.math(mesh, label, step - 1):
                    yield made, step - 1, held


def ahead(
    mesh: Mesh, moves: Iterator[Move], dims: Sequence[Dims], label: str, wires: Sequence[str]
) -> Iterator[Regions]:
    """Yield the regions of one exchange after the other; only one's sources exist at a time.

    Args:
        mesh: the mesh.
        moves: one-step plan and sources of each exchange, made when asked for.
        dims: as of `foldcp.fabric.exchange.autograd.stream`, the same for all.
        label: as of `foldcp.fabric.exchange.autograd.stream`, the same for all.
        wires: as of `foldcp.fabric.exchange.autograd.stream`, the same for all.

    Returns:
        An iterator over the exchanges; each item has one tensor per want and may be kept. With
        gradients on, no exchange runs ahead.

    Source: docs/design/exchanges-and-transports.md.
    """
    if torch.is_grad_enabled():
        yield from _one_by_one(mesh, moves, dims, label, wires)
        return
    under_way = _post(mesh, next(moves, None), dims, label, wires)
    while under_way is not None:
        arrived = next(under_way)
        under_way = None  # lets go of its sources before the next ones are made
        under_way = _post(mesh, next(moves, None), dims, label, wires)
        yield arrived
        del arrived


def behind(
    mesh: Mesh, moves: Iterator[Move], dims: Sequence[Dims], label: str, wires: Sequence[str]
) -> Iterator[Regions]:
    """Run exchanges that send results away: two hold their sources at a time, see `ahead`.

    Args:
        mesh: the mesh.
        moves: one-step plan and sources of each exchange, made when asked for.
        dims: as of `foldcp.fabric.exchange.autograd.stream`, the same for all.
        label: as of `foldcp.fabric.exchange.autograd.stream`, the same for all.
        wires: as of `foldcp.fabric.exchange.autograd.stream`, the same for all.
    """
    if torch.is_grad_enabled():
        yield from _one_by_one(mesh, moves, dims, label, wires)
        return
    under_way = None
    while (move := next(moves, None)) is not None:
        arrived = None if under_way is None else next(under_way)
        under_way = _post(mesh, move, dims, label, wires)
        del move
        if arrived is not None:
            yield arrived
        del arrived
    if under_way is not None:
        yield next(under_way)


def _one_by_one(
    mesh: Mesh, moves: Iterator[Move], dims: Sequence[Dims], label: str, wires: Sequence[str]
) -> Iterator[Regions]:
    for plan, sources in moves:
        yield fetch(mesh, plan, sources, dims, label, wires)


def _post(
    mesh: Mesh, move: Move | None, dims: Sequence[Dims], label: str, wires: Sequence[str]
) -> Iterator[Regions] | None:
    """An exchange under way, whose `next` waits for it; None where there is none."""
    if move is None:
        return None
    found = _arriving(Exchange(mesh, *move, dims, label, wires))
    next(found)
    return found


def _arriving(exchange: Exchange) -> Iterator[Regions]:
    """The first `next` posts, the second waits."""
    with exchange:
        exchange.start(0)
        yield ()
        regions = exchange.wait()
    yield regions
