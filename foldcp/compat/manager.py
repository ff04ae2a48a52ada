"""The ranks of the published interface: manager, grid and 2D communicator."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from foldcp.fabric.mesh import Mesh, local_gpu
from foldcp.fabric.ranks import Ranks

_BACKENDS = {"cuda": "nccl", "cpu": "gloo"}
_GRID = '{"dp": 1, "cp": (R, Q)}'


@dataclass(frozen=True)
class GridLayout:
    """Row-major order of the ranks of a group on its grid.

    Args:
        shape: ranks along each axis, (R, Q).
    """

    shape: tuple[int, ...]

    @property
    def strides(self) -> tuple[int, ...]:
        """Distance in ranks between neighbours along each axis."""
        return tuple(prod(self.shape[i + 1 :]) for i in range(len(self.shape)))

    def ravel(self, coordinates: Sequence[int]) -> int:
        """Return the rank in the group at a grid position."""
        return sum(c * s for c, s in zip(coordinates, self.strides, strict=True))

    def unravel(self, rank: int) -> tuple[int, ...]:
        """Return the grid position of a rank in the group."""
        return tuple(rank // s % n for s, n in zip(self.strides, self.shape, strict=True))


class _Named(dict):
    """Groups that `create_grid_group` made, by name."""

    def __missing__(self, name: str) -> Any:
        raise KeyError(
            f"no group {name!r} (there are {sorted(self)}): call "
            f"DistributedManager.create_grid_group({_GRID}) with that name first"
        )


@dataclass
class _State:
    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    backend: str
    owns_process_group: bool
    device_mesh: DeviceMesh | None = None
    device_mesh_subgroups: DeviceMesh | None = None
    group: dict[str, dist.ProcessGroup] = field(default_factory=_Named)
    subgroups: dict[str, list[dist.ProcessGroup]] = field(default_factory=_Named)
    layout_subgroups: dict[str, GridLayout] = field(default_factory=_Named)


class DistributedManager:
    """This process's place among the ranks; every instance shows the same state.

    Attributes: rank, world_size, local_rank, device, backend; after `create_grid_group` also
    device_mesh (one dimension per group), device_mesh_subgroups (one per grid axis: dp, cp_axis_0,
    cp_axis_1), group, subgroups and layout_subgroups (by group name).

    Raises:
        RuntimeError: `initialize` was not called.
    """

    _state: ClassVar[_State | None] = None

    def __init__(self) -> None:
        self._ready()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ready(), name)

    @classmethod
    def _ready(cls) -> _State:
        if cls._state is None:
            raise RuntimeError(
                "DistributedManager is not initialised: call "
                'DistributedManager.initialize(device_type="cuda") (or "cpu") first'
            )
        return cls._state

    @classmethod
    def is_initialized(cls) -> bool:
        """Tell whether `initialize` was called."""
        return cls._state is not None

    @classmethod
    def initialize(
        cls,
        grid_group_sizes: Mapping[str, int | tuple[int, ...]] | None = None,
        device_type: str = "cuda",
        backend: str | None = None,
    ) -> None:
        """Join the other ranks: torchrun's variables, else a single process.

        Args:
            grid_group_sizes: passed on to `create_grid_group` unless None.
            device_type: "cuda" or "cpu".
            backend: "nccl" or "gloo", the one of `device_type`.

        Raises:
            ValueError: unknown device type, or a backend that does not go with it.
            RuntimeError: "cuda" without a GPU; initialised before for another device type.
        """
        if backend not in (None, _BACKENDS.get(device_type)) or device_type not in _BACKENDS:
            raise ValueError(
                f"`device_type` and `backend` must be one of {_BACKENDS}, got {device_type!r} "
                f"with {backend!r}"
            )
        if device_type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(
                '`device_type` is "cuda" but torch sees no GPU: pass device_type="cpu", or '
                "install a CUDA build of torch"
            )
        if cls._state is None:
            cls._state = _join(device_type)
        elif cls._state.device.type != device_type:
            raise RuntimeError(
                f"DistributedManager runs on {cls._state.device.type} already: call "
                f"DistributedManager.cleanup() before initialising it for {device_type}"
            )
        if grid_group_sizes is not None:
            cls.create_grid_group(grid_group_sizes)

    @classmethod
    def create_grid_group(cls, grid_group_sizes: Mapping[str, int | tuple[int, ...]]) -> None:
        """Lay the ranks out, last group fastest; a tuple makes a group a grid of subgroups.

        Args:
            grid_group_sizes: ranks of each group, for example {"dp": 1, "cp": (2, 2)}.

        Raises:
            ValueError: the sizes do not multiply to the number of ranks.
            RuntimeError: `initialize` was not called.
        """
        state = cls._ready()
        shapes = {k: v if isinstance(v, tuple) else (v,) for k, v in grid_group_sizes.items()}
        total = prod(prod(v) for v in shapes.values())
        if total != state.world_size:
            raise ValueError(
                f"`grid_group_sizes` {dict(grid_group_sizes)} needs {total} ranks but "
                f"{state.world_size} were started: start {total} (torchrun --nproc-per-node "
                f"{total} script.py) or choose sizes that multiply to {state.world_size}"
            )
        names = {
            k: [f"{k}_axis_{i}" for i in range(len(v))] if len(v) > 1 else [k]
            for k, v in shapes.items()
        }
        sizes = tuple(prod(v) for v in shapes.values())
        kind = state.device.type
        coarse = init_device_mesh(kind, sizes, mesh_dim_names=tuple(shapes))
        fine = coarse
        if any(len(v) > 1 for v in shapes.values()):
            axes, lengths = sum(names.values(), []), sum(shapes.values(), ())
            fine = init_device_mesh(kind, lengths, mesh_dim_names=tuple(axes))
        state.device_mesh, state.device_mesh_subgroups = coarse, fine
        for mesh in (coarse, fine):
            state.group |= {name: mesh.get_group(name) for name in mesh.mesh_dim_names or ()}
        grids = {k: v for k, v in shapes.items() if len(v) > 1}
        state.subgroups |= {k: [state.group[a] for a in names[k]] for k in grids}
        state.layout_subgroups |= {k: GridLayout(v) for k, v in grids.items()}

    @classmethod
    def cleanup(cls) -> None:
        """Forget the state, and leave the process group if `initialize` made it."""
        if cls._state is not None and cls._state.owns_process_group:
            dist.destroy_process_group()
        cls._state = None


def _join(device_type: str) -> _State:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device(device_type)
    if device_type == "cuda":
        device = local_gpu(local_rank)
        torch.cuda.set_device(device)
    backend = _BACKENDS[device_type]
    owns = not dist.is_initialized()
    if owns and "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    elif owns:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    rank, world = dist.get_rank(), dist.get_world_size()
    state = _State(rank, world, local_rank, device, backend, owns)
    state.group["world"] = dist.group.WORLD
    return state


@dataclass(frozen=True)
class Ring2DComm:
    """The ranks of a 2D grid; square or not.

    Args:
        group_2d: all R * Q ranks.
        group_col: the R ranks of this rank's grid column.
        layout: the grid, of shape (R, Q).

    Raises:
        ValueError: `layout` is not 2D or does not fit the groups.
    """

    group_2d: dist.ProcessGroup
    group_col: dist.ProcessGroup
    layout: GridLayout

    def __post_init__(self) -> None:
        sizes = dist.get_world_size(self.group_2d), dist.get_world_size(self.group_col)
        shape = tuple(self.layout.shape)
        if len(shape) != 2 or sizes != (prod(shape), shape[0]):
            raise ValueError(
                f"`layout` {shape} does not fit groups of {sizes[0]} and {sizes[1]} ranks: pass "
                'manager.group["cp"], manager.subgroups["cp"][0] and '
                'manager.layout_subgroups["cp"] of a 2D group'
            )

    def mesh(self, device: torch.device) -> Mesh:
        """Return the same ranks as a `foldcp.fabric.mesh.Mesh`."""
        rows, cols = self.layout.shape
        group = self.group_2d if rows * cols > 1 else None
        return Mesh(rows, cols, Ranks(dist.get_rank(self.group_2d), rows * cols, device, group))
