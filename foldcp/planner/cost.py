"""Model the cost of each strategy of the triangle ops on each rank.

**Modelled, not measured**: bytes are exact, seconds follow from the rates of `rates.py`.

    transfer of a step = messages * latency + bytes / link + packing at memory bandwidth
    stream of steps    = first transfer + sum of max(math, next transfer) + last math

Math takes the longest of its operations, exponentials and bytes of memory. A rank's transfer is the
larger of what it sends and receives; links within and between nodes work at the same time. An op
lasts as long as its slowest rank, and at least as long as its host needs to say what is to be done:
both go on beside one another. Left out: how ranks wait for each other in between, what transfers
take from the math beside them, and the mask of keys. Packing is counted for the FP8 wire alone: the
rest lies in memory as it travels.

Source: docs/design/strategies-and-cost.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import gcd

from foldcp.layout.cuts import (
    blocks_of_lines,
    channel_groups,
    channel_pieces,
    chunks,
    line_chunks,
    products_of_panel,
    share_of_channels,
)
from foldcp.layout.strategies import (
    ATTENTION,
    MULTIPLICATION,
    Sizes,
    channel_multiplication,
    exchanges,
)
from foldcp.layout.tiles import PairLayout
from foldcp.layout.volumes import Loads, volumes
from foldcp.planner.rates import Chip, Links

__all__ = ["ATTENTION", "MULTIPLICATION", "Estimate", "Job", "Sizes", "of_ranks"]

CHUNK_BYTES = 256_000_000  # of a chunk on a GPU, see foldcp_kernels/core/chunking.py


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
        near, far, out = self.links.near, self.links.far, []
        for load in loads:
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
            out.append(latency + (moving + packing) / parts)
        return out

    def multiplication(self, groups: int) -> tuple[float, float]:
        """Return the seconds of projecting a and b, in groups of channels, and of the output."""
        s, c = self.sizes, self.sizes.channels
        project = self.tile * c * (groups * s.z_itemsize + 2 * s.itemsize)
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
        host = self.chip.told(exchanges, groups, transfers, launches, products)
        return replace(found, total_s=max(found.total_s, host), host_s=host)


def _streamed(math: float, transfers: Sequence[float]) -> float:
    """Seconds of a stream with so much math in each step."""
    return transfers[0] + sum(max(math, t) for t in transfers[1:]) + math


def _panel_multiplication(job: Job, name: str) -> list[Estimate]:
    lay, s, c = job.layout, job.sizes, job.sizes.channels
    spans = channel_groups(lay, c, s.itemsize, job.chunk_bytes)
    groups = len(spans)
    pieces = channel_pieces(lay, spans[0][1] - spans[0][0], s.itemsize, job.chunk_bytes)
    parts = groups * pieces
    project, output = job.multiplication(groups)
    moved = c * s.itemsize * (lay.tile_rows + lay.tile_cols) * lay.padded
    accumulated = 8 * c * job.tile * lay.panels
    core = job.math(2 * job.tile * lay.padded * c, moved + accumulated)
    (loads,) = job.loads(MULTIPLICATION, name)
    wire, raw = ([c * lay.shard**2 * w] for w in (s.travels(s.itemsize), s.itemsize))
    steps = [job.transfers(x, wire, raw, parts) for x in loads]
    out = []
    for rank, mine in enumerate(zip(*steps, strict=True)):
        stream = _streamed(core / (parts * lay.panels), mine * parts)
        got = sum(step[rank].received(wire) for step in loads)
        ends = project + output
        found = Estimate(ends + core, core, parts * sum(mine), ends + stream, got)
        launches = groups * blocks_of_lines(lay, job.first) + parts * lay.panels + 1
        products = parts * lay.panels * (products_of_panel(lay) - 1)
        out.append(job.done(rank, loads, parts, groups, launches, found, 0, products))
    return out


def _panel_attention(job: Job, name: str) -> list[Estimate]:
    lay, s = job.layout, job.sizes
    n = len(chunks(lay.tile_rows if job.first else lay.tile_cols, job.chunks))
    bias, project, core, output = job.attention(n, lay.tile_cols if job.first else lay.tile_rows)
    (loads,) = job.loads(ATTENTION, name)
    kv, b = 2 * s.channels * lay.shard**2, n * s.heads * s.itemsize * lay.shard**2
    wire, raw = (kv * s.travels(s.itemsize), b), (kv * s.itemsize, b)
    steps = [job.transfers(x, wire, raw, n) for x in loads]
    ends = bias + project + output
    out = []
    for rank, mine in enumerate(zip(*steps, strict=True)):
        stream = _streamed(core / (n * lay.panels), mine * n)
        got = sum(step[rank].received(wire) for step in loads)
        found = Estimate(ends + core, core, n * sum(mine), ends + stream, got)
        out.append(job.done(rank, loads, n, n, 1 + n * (2 + lay.panels), found))
    return out


def _rows(job: Job) -> list[Estimate]:
    lay, s = job.layout, job.sizes
    n = len(line_chunks(lay, job.first, job.chunks))
    bias, project, core, output = job.attention(n, lay.padded)
    x = s.channels * lay.shard**2
    ends = bias + job.math(0, job.tile * s.channels * (s.z_itemsize + s.itemsize))  # LayerNorm
    (lines,), panels, _ = job.loads(ATTENTION, "rows")
    there = back = job.transfers(lines, [x * s.travels(s.itemsize)], [x * s.itemsize], n)
    b = [s.heads * s.itemsize * lay.shard**2]
    steps = [job.transfers(panel, b, b) for panel in panels]
    under = project + core + output
    out = []
    for rank, mine in enumerate(zip(*steps, strict=True)):
        math = (project + output) / n + _streamed(core / (n * lay.panels), mine)
        total = ends + there[rank] + back[rank]
        for i in range(n):
            beside = (there[rank] if i + 1 < n else 0) + (back[rank] if i else 0)
            total += max(math, sum(mine) + beside)
        got = lines[rank].received([2 * x * s.travels(s.itemsize)])
        got += n * sum(panel[rank].received(b) for panel in panels)
        moving = n * (there[rank] + back[rank] + sum(mine))
        found = Estimate(ends + under, under, moving, total, got)
        steps_of_chunk = [lines, lines, *panels]
        out.append(job.done(rank, steps_of_chunk, n, 3 * n, 1 + n * (3 + lay.panels), found))
    return out


def _channel(job: Job) -> list[Estimate]:
    lay, s, size = job.layout, job.sizes, job.layout.size
    grouped = channel_multiplication(lay, s.channels, job.chunks)
    widths = [hi - lo for group in grouped for lo, hi in group]
    last = len(widths) - 1
    project, output = job.multiplication(len(grouped))
    wire, raw = [lay.shard**2 * s.travels(s.itemsize)], [lay.shard**2 * s.itemsize]
    moves = [load for (load,) in job.loads(MULTIPLICATION, "channel")]
    loads = list(zip(moves[::2], moves[1::2], strict=True))
    there, back = ([job.transfers(x[i], wire, raw) for x in loads] for i in (0, 1))
    plane = lay.padded**2
    # A tile is as many blocks as its sides overlap with rows (columns) of tiles.
    rows, cols = lay.mesh_rows, lay.mesh_cols
    products = (rows if job.first else cols) * (rows + cols - gcd(rows, cols))
    out = []
    for rank in range(size):
        shares = [share_of_channels(d, size, rank) for d in widths]
        own = [hi - lo for lo, hi in shares]
        maths = [job.math(2 * plane * lay.padded * d, 3 * plane * s.itemsize * d) for d in own]
        core, ends = sum(maths), project + output
        total = ends + there[0][rank] + back[last][rank]
        for i in range(len(widths)):
            beside = (there[i + 1][rank] if i < last else 0) + (back[i - 1][rank] if i else 0)
            total += max(maths[i], beside)
        moving = sum(x[rank] for x in (*there, *back))
        got = sum(load[rank].received(wire) for both in loads for load in both)
        found = Estimate(ends + core, core, moving, total, got)
        steps = [step for both in loads for step in both]
        launches = len(grouped) + len(widths) + 1
        # Each channel of a and b is a transfer, of what a rank receives and as much that it sends.
        more = sum((2 * d - 1) * 2 * (size - 1) for d in own if d)
        done = 2 * len(widths), launches, found, more, products * len(widths)
        out.append(job.done(rank, steps, 1, *done))
    return out


def of_ranks(op: str, name: str, job: Job) -> list[Estimate]:
    """Model an op on every rank of its mesh.

    Args:
        op: "triangle_multiplication" or "triangle_attention".
        name: a strategy of it.
        job: what it runs with.

    Returns:
        A prediction for each rank, in their order.
    """
    if op == MULTIPLICATION:
        return _channel(job) if name == "channel" else _panel_multiplication(job, name)
    return _rows(job) if name == "rows" else _panel_attention(job, name)
