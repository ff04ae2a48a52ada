"""Lay ranks out as an R x Q mesh that exchanges tiles by one policy over one link."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from foldcp.config import local_rank
from foldcp.fabric.connect import Options, connect
from foldcp.fabric.exchange.timeline import Timeline
from foldcp.fabric.policy import Policy
from foldcp.fabric.ranks import Ranks
from foldcp.fabric.transport.base import Transport
from foldcp.fabric.transport.pool import Pool
from foldcp.fabric.transport.torch_transport import TorchTransport
from foldcp.layout.mesh_shape import choose
from foldcp.layout.tiles import PairLayout, Shaped
from foldcp_kernels.core import arguments

# Tokens that a side of a tile or panel is a multiple of: 32 bytes of bfloat16, what tensor cores
# take at once and loads of 16 bytes need.
_MULTIPLE = {"cuda": 16}


def local_gpu(local_rank: int) -> torch.device:
    """Return the GPU of a rank, given its position among the ranks of its machine.

    Where fewer GPUs are visible they are shared out again from the first, which is the only one
    where each rank is shown its own.
    """
    return torch.device("cuda", local_rank % max(1, torch.cuda.device_count()))


class Traffic:
    """Count the bytes of exchanges, by their labels.

    Attributes:
        sent: bytes on the wire from this rank.
        received: bytes on the wire to this rank.
        staged: bytes that were packed or unpacked on the way.
    """

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        self.staged: Counter[str] = Counter()


@dataclass(eq=False)
class Mesh:
    """A mesh of ranks; rank `r * cols + c` sits at row r, column c.

    Args:
        rows: R.
        cols: Q.
        ranks: the R * Q ranks; by default a single process on the CPU.
        policy: how tiles travel, and the strategies of the triangle ops.
        multiple: number that tokens are padded to a multiple of, see `PairLayout`; 0 is what the
            device needs.
        link: what carries tiles; None is torch.distributed. `leave` takes it away and `rejoin`
            brings another; nothing else of a mesh changes.

    Attributes:
        pool: buffers that exchanges use one after the other.
        traffic: bytes that exchanges moved.
        timeline: records when math runs; None where nobody asks for it.
        recordings: the blocks that are recorded at present, see
            `foldcp.modules.graphs.block_graph`; None: blocks run as they are.
        said: warnings that were given, and are not given again.
        alike: True when a seed gives the same random numbers on all ranks, see
            `foldcp.planner.agreement`.
    """

    rows: int
    cols: int
    ranks: Ranks = field(default_factory=lambda: Ranks(0, 1))
    policy: Policy = Policy()
    multiple: int = 0
    link: Transport | None = None

    def __post_init__(self) -> None:
        self.pool, self.traffic, self.alike = Pool(self.device), Traffic(), True
        self.timeline: Timeline | None = None
        self.recordings: Any = None
        self.said: set[str] = set()
        self.multiple = self.multiple or _MULTIPLE.get(self.device.type, 1)
        if self.link is None and self.ranks.group is not None:
            self.link = TorchTransport(self.ranks)

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
            rows: R.
            cols: Q.
            device: of this rank; "cuda" is the GPU of its local rank (LOCAL_RANK, as launchers set
                it, else the rank), which becomes the current one.
            route: "direct" or "ring", see `Policy`.
            transport: one of `foldcp.config.TRANSPORTS`; None leaves it to `connected`.
            options: of the transport.
            policy: `wire`, `multiplication`, `attention`, `graphs`, `memory`, `contraction`,
                `single`, `tokens` and `atoms`, see `Policy`.

        Raises:
            ValueError: rows * cols differs from the number of ranks, or an unknown name.
            TransportError: the transport cannot run here; every rank raises it.
        """
        world = dist.get_world_size() if dist.is_initialized() else 1
        if rows * cols != world:
            choose(world, f"{rows}x{cols}")
        chosen = Policy(route, **policy)
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            if world == 1:
                device = torch.device("cuda", torch.cuda.current_device())
            else:
                device = local_gpu(local_rank(os.environ, dist.get_rank()))
                torch.cuda.set_device(device)
        if world == 1:
            return cls(rows, cols, Ranks(0, 1, device), chosen)
        bare = cls(rows, cols, Ranks(dist.get_rank(), world, device, dist.group.WORLD), chosen)
        return bare if transport is None else bare.connected(transport, options)

    def connected(self, transport: str, options: Options | None = None) -> Mesh:
        """Return a mesh of the same ranks with another transport; every rank must call it.

        Args:
            transport: one of `foldcp.config.TRANSPORTS`.
            options: how to set it up.

        Raises:
            TransportError: the transport cannot run here; every rank raises it.
        """
        if self.ranks.group is None:
            return self
        link = connect(self.ranks, transport, options or Options())
        return Mesh(self.rows, self.cols, self.ranks, self.policy, self.multiple, link)

    def with_policy(self, **changes: str) -> Mesh:
        """Return a mesh of the same ranks and link under another policy.

        Args:
            changes: fields of `Policy`.

        Raises:
            ValueError: an unknown name.
        """
        return replace(self, policy=replace(self.policy, **changes))

    def close(self) -> None:
        """End the transport; every rank must call it, with no exchange under way."""
        if self.link is not None:
            self.ranks.barrier()
            self.link.close()

    def leave(self, why: str = "") -> Transport | None:
        """Leave the ranks, which need not know: their exchanges with this one fail.

        Until `rejoin` the mesh can exchange nothing.

        Args:
            why: reason for the other ranks, where the transport can pass it on.

        Returns:
            What carried tiles. It must be closed once all ranks have left.
        """
        link = self.link
        if link is not None:
            link.abort(why)
        self.ranks.close_connections()
        self.forget()
        self.pool.clear()
        return link

    def forget(self) -> None:
        """Let go of what joined the ranks, which is closed."""
        self.link = None
        self.ranks.leave()

    def rejoin(self, other: Mesh) -> None:
        """Take over what joins the ranks from a new mesh of the same shape."""
        self.ranks, self.link = other.ranks, other.link

    def is_new(self, warning: str) -> bool:
        """Tell whether a warning was not given before; it counts as given from now on."""
        new = warning not in self.said
        self.said.add(warning)
        return new

    def refuse(self, problem: str) -> NoReturn:
        """Raise ValueError; the exchanges of the other ranks fail if the link can reach them."""
        if self.link is not None:
            self.link.abort(f"rank {self.rank}: {problem}")
        raise ValueError(problem)

    def layout(self, n: int) -> PairLayout:
        """Return the tiling of N tokens, alike on all ranks."""
        return PairLayout(n, self.rows, self.cols, self.rank, self.multiple)

    def check(
        self,
        z: Shaped,
        layout: PairLayout,
        name: str = "z",
        parked: bool = False,
        **options: bool,
    ) -> None:
        """Check a tile's shape and device; if one rank refuses, all raise.

        Args:
            z: the tile.
            layout: the tiling.
            name: of the argument, for messages.
            parked: the tile may be in host memory.
            options: as of `layout.check`.
        """
        device = getattr(z, "device", self.device)
        if device.type not in (self.device.type, "cpu" if parked else ""):
            self.refuse(f"`{name}` is on {device}, but the mesh is on {self.device}: move it there")
        try:
            layout.check(z, name, **options)
        except ValueError as error:
            self.refuse(str(error))

    def fits(self, op: str, *given: Tensor | None, **sizes: int) -> None:
        """Check the arguments of an op, see `arguments.check`; if one rank refuses, all raise.

        Args:
            op: its name in `signatures.TABLE`.
            given: its tensors in the order of the table.
            sizes: sizes that are known, by letter.
        """
        try:
            arguments.check(op, *given, **sizes)
        except ValueError as error:
            self.refuse(str(error))

    @property
    def size(self) -> int:
        """P, the number of ranks."""
        return self.rows * self.cols

    @property
    def rank(self) -> int:
        """Number of this rank."""
        return self.ranks.rank

    @property
    def row(self) -> int:
        """This rank's row."""
        return self.rank // self.cols

    @property
    def col(self) -> int:
        """This rank's column."""
        return self.rank % self.cols

    @property
    def device(self) -> torch.device:
        """Device of this rank's tensors."""
        return self.ranks.device

    @property
    def is_root(self) -> bool:
        """True on the rank that reads inputs and writes outputs."""
        return self.ranks.is_root

    @property
    def waiting(self) -> bool:
        """True while this rank waits for others in an exchange."""
        link = self.link  # another thread may ask while the ranks part
        return link is not None and link.exchanges.waiting

    @property
    def transport(self) -> str:
        """Name of what carries tiles; "none" on one rank."""
        return "none" if self.link is None else self.link.name
