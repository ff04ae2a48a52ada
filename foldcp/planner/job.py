"""Model one op on one mesh: the seconds of its math, of a transfer, and of its host.

**Modelled, not measured**: bytes are exact, seconds follow from the rates of `rates.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from foldcp.layout.strategies import Sizes, exchanges
from foldcp.layout.tiles import PairLayout
from foldcp.layout.volumes import Load, Loads, volumes
from foldcp.planner.rates import Chip, Links
from foldcp_kernels.core.chunking import DEFAULT_BYTES

CHUNK_BYTES = DEFAULT_BYTES["cuda"]


@lru_cache(maxsize=256)
def unit_loads(
    op: str, name: str, mesh: tuple[int, int], first: bool, channels: int, count: int, node: int
) -> tuple[tuple[Loads, ...], ...]:
    """Return what every rank moves in each exchange of a strategy, with one token per shard.

    Elements grow with the square of the shard; nothing else about a load does.

    Args:
        op: as of `exchanges`.
        name: as of `exchanges`.
        mesh: R and Q.
        first: as of `exchanges`.
        channels: D of the strategy "channel"; of the others 1 stands for all.
        count: as of `exchanges`; only of the strategy "channel".
        node: ranks of a node.

    Returns:
        For each exchange its steps.
    """
    unit = PairLayout(mesh[0] * mesh[1], *mesh, 0)
    found = exchanges(op, name, unit, Sizes(channels=channels), first, count, CHUNK_BYTES)
    return tuple(volumes(x.plan.schedule, x.kinds, node) for x in found)


@dataclass(frozen=True)
class Estimate:
    """Modelled cost of one op on its slowest rank.

    Args:
        compute_s: all math of the op.
        core_s: the part of it that transfers run under.
        transfer_s: all transfers one after the other, hidden or not.
        total_s: start to end.
        received_bytes: on the wire, mean over the ranks.
        host_s: what the host takes, of `total_s` at most.
    """

    compute_s: float
    core_s: float
    transfer_s: float
    total_s: float
    received_bytes: float
    host_s: float = 0.0

    @property
    def exposed_s(self) -> float:
        """Time without math: transfers that nothing hides."""
        return self.total_s - self.compute_s

    @property
    def efficiency(self) -> float:
        """Overlap efficiency: time of the math alone over time with transfers."""
        return self.compute_s / self.total_s


@dataclass(frozen=True)
class Job:
    """One op on one mesh.

    Args:
        layout: the tiling, of any rank.
        sizes: of the op.
        chip: processor of each rank.
        links: network between them.
        first: outgoing or starting; False is incoming or ending.
        chunks: of lines or of channels.
        chunk_bytes: largest temporary of a chunk.
    """

    layout: PairLayout
    sizes: Sizes
    chip: Chip
    links: Links
    first: bool
    chunks: int
    chunk_bytes: int = CHUNK_BYTES

    @property
    def tile(self) -> int:
        """Elements of one channel of a tile."""
        return self.layout.tile_rows * self.layout.tile_cols

    def math(self, flops: float, moved: float, exps: float = 0) -> float:
        """Return the seconds of a kernel.

        Args:
            flops: of products.
            moved: bytes.
            exps: exponentials.
        """
        return self.chip.seconds(self.sizes.itemsize, flops, moved, exps)

    def contraction(self, flops: float, moved: float) -> float:
        """Return the seconds of products of planes, see `math`.

        Args:
            flops: of products.
            moved: bytes.
        """
        return self.chip.seconds(self.sizes.plane_itemsize, flops, moved)

    def transfers(
        self, loads: Loads, wire: Sequence[float], raw: Sequence[float], parts: int = 1
    ) -> list[float]:
        """Return the seconds of a step on each rank, with one of `parts` equal parts of loads.

        Args:
            wire: bytes of an element of each kind on the wire.
            raw: bytes of an element of each kind in memory.
            loads: what every rank moves.
            parts: of the loads.
        """
        alike = {load: self._transfer(load, wire, raw, parts) for load in set(loads)}
        return [alike[load] for load in loads]

    def _transfer(
        self, load: Load, wire: Sequence[float], raw: Sequence[float], parts: int
    ) -> float:
        near, far = self.links.near, self.links.far
        moved, packed = (
            [sum(w * e[i] for w, e in zip(by, load.elements, strict=True)) for i in range(4)]
            for by in (wire, raw)
        )
        moving = max(max(moved[::2]) / near.rate(), max(moved[1::2]) / far.rate())
        # Packing reads and writes what is sent, unpacking what is received.
        packing = 0.0
        if self.sizes.wire == "fp8":
            packing = 4 * max(sum(packed[:2]), sum(packed[2:])) / self.chip.memory()
        latency = load.messages[0] * near.latency + load.messages[1] * far.latency
        return latency + (moving + packing) / parts

    def multiplication(self, groups: int) -> tuple[float, float]:
        """Return the seconds of projecting a and b, in groups of channels, and of the output."""
        s, c = self.sizes, self.sizes.channels
        project = self.tile * c * (groups * s.z_itemsize + 2 * s.plane_itemsize)
        output = self.tile * c * (2 * s.z_itemsize + s.itemsize)
        flops = 4 * self.tile * c * c
        return self.math(2 * flops, project), self.math(flops, output)

    def attention(self, count: int, queries: int) -> tuple[float, float, float, float]:
        """Return the seconds of bias, projections, attention of lines, and output.

        Args:
            count: chunks of lines.
            queries: positions of a line whose queries this rank has.
        """
        s, c, n = self.sizes, self.sizes.channels, self.layout.padded
        x, bias = self.tile * c, self.tile * s.heads
        lines = self.tile // queries
        moved = s.itemsize * (2 * x + 2 * lines * n * c + count * s.heads * queries * n)
        carried = 8 * x * (self.layout.panels - 1)  # float32, between panels
        return (
            self.math(2 * bias * c, x * s.z_itemsize + bias * s.itemsize),
            self.math(6 * x * c, x * (s.z_itemsize + 3 * s.itemsize)),
            self.math(4 * x * n, moved + carried, bias * n),
            self.math(4 * x * c, x * (2 * s.z_itemsize + s.itemsize)),
        )

    def loads(self, op: str, name: str) -> tuple[tuple[Loads, ...], ...]:
        """Return what every rank moves in each exchange, see `unit_loads`.

        Args:
            op: "triangle_multiplication" or "triangle_attention".
            name: a strategy of it.
        """
        channels, count = (self.sizes.channels, self.chunks) if name == "channel" else (1, 1)
        mesh = self.layout.mesh_rows, self.layout.mesh_cols
        return unit_loads(op, name, mesh, self.first, channels, count, self.links.node)

    def done(
        self,
        rank: int,
        loads: Sequence[Loads],
        times: int,
        exchanges: int,
        launches: int,
        found: Estimate,
        more: int = 0,
        products: int = 0,
    ) -> Estimate:
        """Sum up an estimate, with what the host takes, for `times` the steps of some loads.

        Args:
            more: transfers, beyond one per message.
            products: of torch, beside the launches.
            rank: the rank.
            loads: steps of the exchanges.
            times: number of such steps.
            exchanges: of the op.
            launches: of kernels.
            found: the estimate without the host.
        """
        messages = [2 * sum(step[rank].messages) for step in loads]
        groups = times * sum(n > 0 for n in messages)
        transfers = times * sum(messages) + more
        host = self.chip.host_seconds(exchanges, groups, transfers, launches, products)
        return replace(found, total_s=max(found.total_s, host), host_s=host)
