"""Triangle multiplication of the published interface: DTensors in and out, our ring inside."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from enum import Enum
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module

from foldcp.compat.manager import Ring2DComm
from foldcp.fabric.exchange.autograd import fetch
from foldcp.fabric.mesh import Mesh
from foldcp.layout.schedule import Plan, boxes_plan
from foldcp.layout.tiles import Box, PairLayout, Span
from foldcp.modules.base import wide
from foldcp.modules.trunk.triangle import TriangleMultiplication
from foldcp.rings.triangle_multiplication import contraction
from foldcp_kernels.core.recompute import nothing
from foldcp_kernels.triangle_multiplication import TriangleMultiplicationWeights
from foldcp_kernels.triangle_multiplication.parts import chosen, gated_update

_PARAMETERS = {
    "norm_in.weight",
    "norm_in.bias",
    "p_in.weight",
    "g_in.weight",
    "norm_out.weight",
    "norm_out.bias",
    "p_out.weight",
    "g_out.weight",
}


class Direction(Enum):
    """Direction of triangle multiplication: Algorithm 12 (outgoing) or 13 (incoming)."""

    Outgoing = "outgoing"
    Incoming = "incoming"


Outgoing, Incoming = Direction.Outgoing, Direction.Incoming


class DistributedTriangleMultiplication(TriangleMultiplication):
    """Triangle multiplication on DTensors, without the residual.

    Its parameters are copies of those of `layer`, as DTensors replicated over `device_mesh` from
    its first rank; their gradients are added up over the ranks.

    Args:
        direction: `Outgoing` or `Incoming`.
        layer: Boltz's TriangleMultiplicationOutgoing or ...Incoming, on any device.
        device_mesh: manager.device_mesh_subgroups, or any mesh with the two axes of `comm`.
        comm: the 2D grid.

    Raises:
        ValueError: `layer` is another layer, or `device_mesh` lacks the axes of `comm`.
    """

    def __init__(
        self, direction: Direction, layer: nn.Module, device_mesh: DeviceMesh, comm: Ring2DComm
    ) -> None:
        _check_layer(layer, direction)
        axes = _grid_axes(device_mesh, comm)
        kind = device_mesh.device_type
        device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else "cpu"
        replicated = distribute_module(copy.deepcopy(layer), device_mesh)
        super().__init__(replicated, comm.mesh(torch.device(device)))
        self.outgoing = direction is Outgoing
        self.device_mesh, self.comm, self.axes = device_mesh, comm, axes

    def forward(self, x: DTensor, mask: DTensor) -> DTensor:  # type: ignore[override]
        """Return the update of the pair tensor.

        Args:
            x: pair tensor [B, N, N, C], Shard(1) and Shard(2) over the two grid axes, Shard(0) or
                Replicate over others; any N.
            mask: [B, N, N], 1 = keep, placed like `x`.

        Returns:
            [B, N, N, C], placed like `x`; add it to `x` for the residual.

        Raises:
            ValueError: `x` or `mask` is no DTensor on `device_mesh`, or placed differently.
        """
        self._check(x, mask)
        layout = self.mesh.layout(x.shape[1])
        z = _to_tile(x.to_local(), layout, self.mesh)
        keep = _to_tile(mask.detach().to_local().to(z.dtype), layout, self.mesh)
        update = _update(z, keep, self._local_weights(x), self.outgoing, layout, self.mesh)
        return DTensor.from_local(
            _from_tile(update, layout, self.mesh).contiguous(),
            self.device_mesh,
            x.placements,
            run_check=False,
            shape=x.shape,
            stride=torch.empty(x.shape, device="meta").stride(),
        )

    def _check(self, x: DTensor, mask: DTensor) -> None:
        for name, t, ndim in (("x", x, 4), ("mask", mask, 3)):
            if not isinstance(t, DTensor) or t.device_mesh != self.device_mesh:
                raise ValueError(
                    f"`{name}` must be a DTensor on {self.device_mesh}, got "
                    f"{t.device_mesh if isinstance(t, DTensor) else type(t).__name__}: use "
                    "torch.distributed.tensor.distribute_tensor"
                )
            if t.ndim != ndim or t.shape[1] != t.shape[2]:
                raise ValueError(
                    f"`{name}` must be [B, N, N{', C' * (ndim == 4)}], got {list(t.shape)}"
                )
            want = [p if p == Shard(0) else Replicate() for p in t.placements]
            want[self.axes], want[self.axes + 1] = Shard(1), Shard(2)
            if list(t.placements) != want or t.placements != x.placements:
                raise ValueError(
                    f"`{name}` is placed {list(t.placements)}, expected {want} for `x` and "
                    f"`mask` alike: redistribute it with {name}.redistribute(placements=...)"
                )

    def _local_weights(self, x: DTensor) -> TriangleMultiplicationWeights:
        # Ranks that hold different parts of `x` hold different parts of the gradient.
        groups = [self.comm.group_2d]
        for i, p in enumerate(x.placements):
            if i not in (self.axes, self.axes + 1) and isinstance(p, Shard):
                groups.append(self.device_mesh.get_group(i))
        local = [p.to_local() for p in vars(self.weights()).values()]
        return TriangleMultiplicationWeights(*_SumGradients.apply(groups, *local))


class DistributedTriangleMultiplicationOutgoing(DistributedTriangleMultiplication):
    """`DistributedTriangleMultiplication(Outgoing, ...)`."""

    def __init__(self, layer: nn.Module, device_mesh: DeviceMesh, comm: Ring2DComm) -> None:
        super().__init__(Outgoing, layer, device_mesh, comm)


class DistributedTriangleMultiplicationIncoming(DistributedTriangleMultiplication):
    """`DistributedTriangleMultiplication(Incoming, ...)`."""

    def __init__(self, layer: nn.Module, device_mesh: DeviceMesh, comm: Ring2DComm) -> None:
        super().__init__(Incoming, layer, device_mesh, comm)


class _SumGradients(torch.autograd.Function):
    """The identity on replicated parameters; their gradients are added up over the ranks."""

    @staticmethod
    def forward(ctx: Any, groups: Sequence[dist.ProcessGroup], *params: Tensor) -> Any:
        ctx.groups = groups
        return tuple(p.view_as(p) for p in params)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        total = torch.cat([wide(g).flatten() for g in grads])  # one message for all of them
        for group in ctx.groups:
            dist.all_reduce(total, group=group)
        parts = total.split([g.numel() for g in grads])
        return None, *(p.view_as(g).to(g.dtype) for p, g in zip(parts, grads, strict=True))


def _check_layer(layer: nn.Module, direction: Direction) -> None:
    if not isinstance(direction, Direction):
        raise ValueError(f"`direction` must be Outgoing or Incoming, got {direction!r}")
    names = {name for name, _ in layer.named_parameters()}
    if names != _PARAMETERS:
        raise ValueError(
            f"`layer` must be Boltz's TriangleMultiplication{direction.name} with the parameters "
            f"{sorted(_PARAMETERS)}, got {type(layer).__name__} with {sorted(names)}"
        )
    other = Incoming if direction is Outgoing else Outgoing
    if type(layer).__name__.endswith(other.name):
        raise ValueError(
            f"`layer` is a {type(layer).__name__} but `direction` is {direction.name}: "
            f"pass {other.name}"
        )


def _grid_axes(device_mesh: DeviceMesh, comm: Ring2DComm) -> int:
    """The first of the two neighbouring mesh dimensions that hold the ranks of the grid."""
    here = device_mesh.get_coordinate()
    ranks = dist.get_process_group_ranks(comm.group_2d)
    for i in reversed(range(device_mesh.ndim - 1)):
        if here is None or tuple(device_mesh.shape[i : i + 2]) != tuple(comm.layout.shape):
            continue
        mine = device_mesh.mesh[(*here[:i], slice(None), slice(None), *here[i + 2 :])]
        if mine.flatten().tolist() == ranks:
            return i
    raise ValueError(
        f"`device_mesh` {device_mesh} has no two axes with the ranks {ranks} of `comm`: pass "
        "manager.device_mesh_subgroups of the grid that `comm` was made of"
    )


def _update(
    z: Tensor,
    mask: Tensor,
    w: TriangleMultiplicationWeights,
    outgoing: bool,
    layout: PairLayout,
    mesh: Mesh,
) -> Tensor:
    """Return what `foldcp.rings.triangle_multiplication` adds to z; z itself stays as it is."""
    mesh.fits("triangle_multiplication tile", z, mask, *vars(w).values())
    if not z.numel():
        return nothing(z, *vars(w).values())
    parts = chosen(z, w, mesh.policy.contraction)
    update = contraction(z, mask, w, outgoing, layout, mesh, parts)
    return gated_update(z, update, w, parts, residual=False)


def _chunk_spans(n: int, parts: int) -> list[Span]:
    """Cut n as DTensor (and `torch.chunk`) does: the last parts may be smaller, or empty."""
    width = -(-n // parts)
    return [(min(i * width, n), min((i + 1) * width, n)) for i in range(parts)]


@lru_cache(maxsize=64)
def _plans(layout: PairLayout) -> tuple[Plan, Plan] | None:
    """Plan the moves from DTensor shards to tiles and back; None where both hold the same."""
    rows = _chunk_spans(layout.n, layout.mesh_rows)
    cols = _chunk_spans(layout.n, layout.mesh_cols)
    shards: tuple[Box, ...] = tuple((r, c) for r in rows for c in cols)
    tiles: tuple[Box, ...] = tuple(
        tuple((min(lo, layout.n), min(hi, layout.n)) for lo, hi in layout.tile_box(rank))
        for rank in range(layout.size)
    )
    if shards == tiles:
        return None
    return (
        boxes_plan(layout.size, layout.rank, shards, tiles),
        boxes_plan(layout.size, layout.rank, tiles, shards),
    )


def _to_tile(x: Tensor, layout: PairLayout, mesh: Mesh) -> Tensor:
    """A DTensor shard [B, rows, cols, ...] as a tile, 0 on the padding."""
    plans = _plans(layout)
    if plans is not None:
        (x,) = fetch(mesh, plans[0], (x,), ((1, 2),), "dtensor")
    missing = layout.tile_cols - x.shape[2], layout.tile_rows - x.shape[1]
    if missing == (0, 0):
        return x
    return F.pad(x, (0, 0) * (x.ndim - 3) + (0, missing[0], 0, missing[1]))


def _from_tile(x: Tensor, layout: PairLayout, mesh: Mesh) -> Tensor:
    """A tile as a DTensor shard."""
    for dim, span in zip((1, 2), layout.tile_box(), strict=True):
        x = x.narrow(dim, 0, layout.valid(span))
    plans = _plans(layout)
    return x if plans is None else fetch(mesh, plans[1], (x,), ((1, 2),), "dtensor")[0]
