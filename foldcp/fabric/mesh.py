"""The R x Q mesh of ranks and the small control messages between them."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from foldcp.config import ATTENTION, MULTIPLICATION, WIRES, local_rank
from foldcp.fabric.broadcast import broadcast
from foldcp.fabric.connect import Options, connect
from foldcp.fabric.transport.base import TorchTransport, Transport
from foldcp.fabric.transport.pool import Pool
from foldcp.layout.mesh_shape import choose
from foldcp.layout.tiles import PairLayout, Shaped
from foldcp_kernels.core import arguments

# Of each triangle op, "auto" first.
STRATEGIES = {"triangle_multiplication": MULTIPLICATION, "triangle_attention": ATTENTION}
# Tokens that a side of a tile or panel is a multiple of: 32 bytes of bfloat16, what tensor cores
# take at once and loads of 16 bytes need.
_MULTIPLE = {"cuda": 16}
_NEVER = 0x5EED  # a tag that no message carries
_POLICY = {"wire": WIRES, "multiplication": MULTIPLICATION, "attention": ATTENTION}


def local_gpu(local_rank: int) -> torch.device:
    """The GPU of a rank, given its position among the ranks of its machine.

    Where fewer GPUs are visible they are shared out again from the first, which is the only one
    where each rank is shown its own.
    """
    return torch.device("cuda", local_rank % max(1, torch.cuda.device_count()))


@dataclass(frozen=True)
class Mesh:
    """A mesh of ranks; rank `r * cols + c` sits at row r, column c.

    Args:
        rows: R.
        cols: Q.
        rank: this rank.
        device: where its tensors live.
        group: torch.distributed group, None for a single process.
        route: "direct" or "ring", where tiles are fetched from.
        wire: "raw" or "fp8", how panels travel.
        multiplication: strategy of triangle multiplication, "auto" or a name of `STRATEGIES`.
        attention: strategy of triangle attention, "auto" or a name of `STRATEGIES`.
        multiple: of tokens, see `PairLayout`; 0 is what the device needs.
        link: what carries tiles; None is torch.distributed.
        told: number of objects that each rank has sent to the others.
        alike: a seed gives the same random numbers on all ranks, see `foldcp.planner.agreement`.
    """

    rows: int
    cols: int
    rank: int
    device: torch.device
    group: Any = None
    route: str = "direct"
    wire: str = "raw"
    multiplication: str = "auto"
    attention: str = "auto"
    multiple: int = 0
    link: Transport | None = field(default=None, compare=False)
    alike: bool = field(default=True, compare=False)
    pool: Pool = field(default=None, compare=False)  # type: ignore[assignment]
    sent: Counter = field(default_factory=Counter, compare=False)
    received: Counter = field(default_factory=Counter, compare=False)
    staged: Counter = field(default_factory=Counter, compare=False)
    told: Counter = field(default_factory=Counter, compare=False)

    def __post_init__(self) -> None:
        if self.pool is None:
            object.__setattr__(self, "pool", Pool(self.device))
        if not self.multiple:
            object.__setattr__(self, "multiple", _MULTIPLE.get(self.device.type, 1))
        if self.link is None and self.group is not None:
            object.__setattr__(self, "link", TorchTransport(self))

    @classmethod
    def create(
        cls,
        rows: int,
        cols: int,
        device: torch.device | str = "cpu",
        route: str = "direct",
        transport: str | None = "auto",
        options: Options | None = None,
        **policy: str,
    ) -> Mesh:
        """Build the mesh over the default process group (none is needed for 1x1).

        Args:
            rows: see the class.
            cols: see the class.
            route: see the class.
            device: of this rank; "cuda" is the GPU of its local rank (LOCAL_RANK, as launchers set
                it, else the rank), which becomes the current one.
            transport: one of `foldcp.config.TRANSPORTS`; None leaves it to `connected`.
            options: of the transport.
            policy: `wire`, `multiplication` and `attention`, see the class.

        Raises:
            ValueError: rows * cols differs from the number of ranks, or an unknown name.
            TransportError: the transport cannot run here; every rank raises it.
        """
        world = dist.get_world_size() if dist.is_initialized() else 1
        if rows * cols != world:
            choose(world, f"{rows}x{cols}")
        for name, value in policy.items():
            if value not in _POLICY[name]:
                raise ValueError(f"{name} must be one of {_POLICY[name]}, got {value!r}")
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            if world == 1:
                device = torch.device("cuda", torch.cuda.current_device())
            else:
                device = local_gpu(local_rank(os.environ, dist.get_rank()))
                torch.cuda.set_device(device)
        if world == 1:
            return cls(rows, cols, 0, device, None, route, **policy)
        bare = cls(rows, cols, dist.get_rank(), device, dist.group.WORLD, route, **policy)
        return bare if transport is None else bare.connected(transport, options)

    def connected(self, transport: str, options: Options | None = None) -> Mesh:
        """This mesh with a transport, see `create`; every rank must call it."""
        if self.group is None:
            return self
        return replace(self, link=connect(self, transport, options or Options()))

    def close(self) -> None:
        """End the transport; every rank must call it, with no exchange under way."""
        if self.link is not None:
            self.barrier()
            self.link.close()

    def cut(self, why: str) -> Transport | None:
        """Leave the ranks, which need not know: their exchanges with this one fail.

        Until `rejoin` the mesh can exchange nothing.

        Args:
            why: what the other ranks are told where the transport can tell them.

        Returns:
            What carried tiles. It must be closed once all ranks have cut.
        """
        link = self.link
        if link is not None:
            link.abort(why)
        self._close_connections()
        self.forget()
        self.pool.clear()
        return link

    def forget(self) -> None:
        """Let go of what joined the ranks, which is closed."""
        # Frozen for its users; what joins the ranks is the one thing that can be renewed.
        object.__setattr__(self, "link", None)
        object.__setattr__(self, "group", None)

    def _close_connections(self) -> None:
        """Make the other ranks fail that wait for this one in a collective of gloo.

        Gloo has no abort, and closes its connections only when nothing refers to the group any
        more. A receive that times out closes the connection at once.
        """
        for peer in range(self.size) if self.group is not None else ():
            if peer != self.rank:
                with suppress(RuntimeError):  # what it is for
                    ask = dist.irecv(torch.empty(1), self.global_rank(peer), self.group, tag=_NEVER)
                    ask.wait(timedelta(milliseconds=1))

    def rejoin(self, other: Mesh) -> None:
        """Take over what joins the ranks from a new mesh of the same shape."""
        plain = isinstance(other.link, TorchTransport)
        object.__setattr__(self, "group", other.group)
        object.__setattr__(self, "told", other.told)
        object.__setattr__(self, "link", TorchTransport(self) if plain else other.link)

    def refuse(self, problem: str) -> NoReturn:
        """Raise ValueError; the exchanges of the other ranks fail where they can be told."""
        if self.link is not None:
            self.link.abort(f"rank {self.rank}: {problem}")
        raise ValueError(problem)

    def layout(self, n: int) -> PairLayout:
        """The tiling of N tokens, alike on all ranks."""
        return PairLayout(n, self.rows, self.cols, self.rank, self.multiple)

    def check(self, z: Shaped, layout: PairLayout, name: str = "z", **options: bool) -> None:
        """`layout.check`, and that it is on the mesh's kind of device; heard by all ranks."""
        device = getattr(z, "device", self.device)
        if device.type != self.device.type:
            self.refuse(f"`{name}` is on {device}, but the mesh is on {self.device}: move it there")
        try:
            layout.check(z, name, **options)
        except ValueError as error:
            self.refuse(str(error))

    def fits(self, op: str, *given: Tensor | None, **sizes: int) -> None:
        """`foldcp_kernels.core.arguments.check`, heard by all ranks."""
        try:
            arguments.check(op, *given, **sizes)
        except ValueError as error:
            self.refuse(str(error))

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
        """Name of what carries tiles; "none" on one rank."""
        return "none" if self.link is None else self.link.name

    def global_rank(self, rank: int) -> int:
        """Rank in the default process group."""
        return dist.get_global_rank(self.group, rank)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.group is not None:
            dist.all_reduce(torch.zeros(1), group=self.group)

    def broadcast_object(self, obj: Any, src: int = 0) -> Any:
        """Every rank gets the object of rank `src`, which must be what `message` lets travel."""
        return obj if self.group is None else broadcast(obj, self, src)

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Every rank gets the list of all ranks' objects, in rank order."""
        if self.group is None:
            return [obj]
        return [self.broadcast_object(obj, src) for src in range(self.size)]
