"""The R x Q mesh of ranks and the small control messages between them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist


def choose(world: int, spec: str = "auto") -> tuple[int, int]:
    """Pick the mesh for a number of ranks.

    Args:
        world: number of ranks.
        spec: "auto" (the most square factorisation, rows <= cols) or "RxQ", for example "2x4".

    Returns:
        (rows, cols) with rows * cols == world.

    Raises:
        ValueError: `spec` is malformed or does not fit `world`.
    """
    if spec == "auto":
        rows = max(r for r in range(1, int(world**0.5) + 1) if world % r == 0)
        return rows, world // rows
    parts = spec.lower().split("x")
    if len(parts) != 2 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise ValueError(f"mesh {spec!r} is not of the form RxQ: set FOLDCP_MESH=2x4 or auto")
    rows, cols = int(parts[0]), int(parts[1])
    if rows * cols != world:
        raise ValueError(
            f"mesh {spec} needs {rows * cols} ranks but {world} were started: start "
            f"{rows * cols} ranks (--nproc {rows * cols}) or set FOLDCP_MESH=auto"
        )
    return rows, cols


@dataclass(frozen=True)
class Mesh:
    """A mesh of ranks; rank `r * cols + c` sits at row r, column c.

    Args:
        rows: R. cols: Q. rank: this rank. device: where its tensors live.
        group: torch.distributed group, None for a single process.
        route: "direct" or "ring", where tiles are fetched from.
    """

    rows: int
    cols: int
    rank: int
    device: torch.device
    group: Any = None
    route: str = "direct"
    sent: Counter = field(default_factory=Counter, compare=False)
    received: Counter = field(default_factory=Counter, compare=False)

    @classmethod
    def create(
        cls, rows: int, cols: int, device: torch.device | str = "cpu", route: str = "direct"
    ) -> Mesh:
        """Build the mesh over the default process group (none is needed for 1x1).

        Raises:
            ValueError: rows * cols differs from the number of ranks.
        """
        world = dist.get_world_size() if dist.is_initialized() else 1
        if rows * cols != world:
            choose(world, f"{rows}x{cols}")
        group = dist.group.WORLD if world > 1 else None
        rank = dist.get_rank() if world > 1 else 0
        device = torch.device(device)
        if group is not None and device.type == "cuda":
            # NCCL wants every rank in the first call of a group; point-to-point calls come later.
            dist.all_reduce(torch.zeros(1, device=device), group=group)
        return cls(rows, cols, rank, device, group, route)

    @property
    def size(self) -> int:
        """P, the number of ranks."""
        return self.rows * self.cols

    @property
    def row(self) -> int:
        """This rank's row."""
        return self.rank // self.cols

    @property
    def col(self) -> int:
        """This rank's column."""
        return self.rank % self.cols

    @property
    def is_root(self) -> bool:
        """True on the rank that reads inputs and writes outputs."""
        return self.rank == 0

    @property
    def transport(self) -> str:
        """Name of what carries tiles: "none", "gloo" or "nccl"."""
        if self.group is None:
            return "none"
        return "nccl" if self.device.type == "cuda" else "gloo"

    def global_rank(self, rank: int) -> int:
        """Rank in the default process group."""
        return dist.get_global_rank(self.group, rank)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.group is not None:
            self.all_gather_object(None)

    def broadcast_object(self, obj: Any, src: int = 0) -> Any:
        """Every rank gets the object of rank `src` (pickled)."""
        if self.group is None:
            return obj
        box = [obj if self.rank == src else None]
        dist.broadcast_object_list(
            box, self.global_rank(src), self.group, device=torch.device("cpu")
        )
        return box[0]

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Every rank gets the list of all ranks' objects (pickled), in rank order."""
        if self.group is None:
            return [obj]
        return [self.broadcast_object(obj, src) for src in range(self.size)]
