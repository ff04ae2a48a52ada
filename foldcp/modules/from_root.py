"""Numbers that rank 0 makes for all ranks: a seed gives other ones on another kind of GPU.

How many numbers of the generator a draw of many elements takes, and which, depends on the number of
multiprocessors of a GPU and on torch's version (`foldcp.planner.agreement`). Ranks that are
alike draw the same numbers each for itself; else all take those of rank 0, which are stock's on
its GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from foldcp.fabric.exchange.autograd import fetch
from foldcp.fabric.mesh import Mesh
from foldcp.layout.schedule import boxes_plan


def from_root(mesh: Mesh, make: Callable[[], Tensor], like: Tensor, label: str) -> Tensor:
    """Call `make` on rank 0 and return its tensor on every rank.

    Args:
        mesh: the mesh.
        make: called on rank 0 only.
        like: gives shape, dtype and device.
        label: of the exchange.
    """
    if mesh.size == 1:
        return make()
    whole = ((0, like.numel()),)
    own = (whole, *(((0, 0),) for _ in range(mesh.size - 1)))
    plan = boxes_plan(mesh.size, mesh.rank, own, (whole,) * mesh.size)
    source = make().flatten() if mesh.is_root else like.new_empty(0)
    return fetch(mesh, plan, (source,), ((0,),), label)[0].view(like.shape)


def drawn(mesh: Mesh, draw: Callable[[], Tensor], like: Tensor) -> Tensor:
    """Draw random numbers, the same on every rank.

    Args:
        mesh: the mesh.
        draw: draws them.
        like: gives their shape, dtype and device.
    """
    return draw() if mesh.alike else from_root(mesh, draw, like, "random numbers")


def normal(mesh: Mesh, *shapes: tuple[int, ...], like: Tensor) -> tuple[Tensor, ...]:
    """Draw standard normal numbers, the same on every rank, tensor by tensor.

    Args:
        mesh: the mesh.
        shapes: in the order of the draws.
        like: gives dtype and device.
    """
    options = dict(dtype=like.dtype, device=like.device)
    if mesh.alike:
        return tuple(torch.randn(shape, **options) for shape in shapes)
    sizes = [torch.Size(shape).numel() for shape in shapes]
    packed = from_root(
        mesh,
        lambda: torch.cat([torch.randn(shape, **options).flatten() for shape in shapes]),
        like.new_empty(sum(sizes)),
        "random numbers",
    )
    return tuple(x.view(s) for x, s in zip(packed.split(sizes), shapes, strict=True))
