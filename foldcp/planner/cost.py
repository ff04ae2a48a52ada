"""What each strategy of the triangle ops costs on each rank.

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
from math import gcd

from foldcp.layout.plans import chunks
from foldcp.layout.tiles import PairLayout
from foldcp.layout.triangle_plans import blocks_of_lines, products_of_panel
from foldcp.planner.rates import Chip, Links
from foldcp.planner.traffic import (
    Loads,
    bias_loads,
    channel_loads,
    channel_widths,
    channels_of,
    line_loads,
    panel_loads,
)

MULTIPLICATION, ATTENTION = "triangle_multiplication", "triangle_attention"
# How the rings cut panels of triangle multiplication: groups of channels and pieces of a group.
GROUPS, PIECES = 4, 8


@dataclass(frozen=True)
class Sizes:
    """Bytes of an element of z and of what is computed in, C = D channels, H heads, wire format."""

    z_itemsize: int = 4
    itemsize: int = 2
    channels: int = 128
    heads: int = 4
    wire: str = "raw"

    def travels(self, itemsize: int) -> float:
        """Bytes of an element on the wire; FP8 has a float32 scale per 128 elements."""
        return 1 + 4 / 128 if self.wire == "fp8" else itemsize


@dataclass(frozen=True)
class Prediction:
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
    """One op on one mesh; `chunks` is the number of chunks, of lines or of channels."""

    layout: PairLayout
    sizes: Sizes
    chip: Chip
    links: Links
    first: bool
    chunks: int

    @property
    def tile(self) -> int:
        """Elements of one channel of a tile."""
        return self.layout.tile_rows * self.layout.tile_cols

    def math(self, flops: float, moved: float, exps: float = 0) -> float:
        """Seconds of a kernel."""
        return self.chip.seconds(self.sizes.itemsize, flops, moved, exps)

    def transfers(
        self, loads: Loads, wire: Sequence[float], raw: Sequence[float], parts: int = 1
    ) -> list[float]:
        """Seconds of one step on each rank, with one of `parts` equal parts of the loads.

        Args:
            wire: bytes of an element of each kind on the wire.
            raw: bytes of an element of each kind in memory.
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
        """Seconds of projecting a and b, in groups of channels, and of the output."""
        s, c = self.sizes, self.sizes.channels
        project = self.tile * c * (groups * s.z_itemsize + 2 * s.itemsize)
        output = self.tile * c * (2 * s.z_itemsize + s.itemsize)
        flops = 4 * self.tile * c * c
        return self.math(2 * flops, project), self.math(flops, output)

    def attention(self, count: int, queries: int) -> tuple[float, float, float, float]:
        """Seconds of bias, projections, attention of lines with so many queries, and output."""
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

    def line_chunks(self) -> int:
        """Chunks that the lines of a tile are cut in."""
        return len(chunks(self.layout.shard, self.chunks))

    def done(
        self,
        rank: int,
        loads: Sequence[Loads],
        times: int,
        exchanges: int,
        launches: int,
        found: Prediction,
        more: int = 0,
        products: int = 0,
    ) -> Prediction:
        """A prediction with what the host takes, `times` the steps of some loads.

        Args:
            more: transfers, beyond one per message.
            products: of torch, beside the launches.
        """
        messages = [2 * sum(step[rank].messages) for step in loads]
        groups = times * sum(n > 0 for n in messages)
        transfers = times * sum(messages) + more
        host = self.chip.told(exchanges, groups, transfers, launches, products)
        return replace(found, total_s=max(found.total_s, host), host_s=host)


def _streamed(math: float, transfers: Sequence[float]) -> float:
    """Seconds of a stream with so much math in each step."""
    return transfers[0] + sum(max(math, t) for t in transfers[1:]) + math


def _panel_multiplication(job: Job, route: str) -> list[Prediction]:
    lay, s, c = job.layout, job.sizes, job.sizes.channels
    least = job.chip.piece_bytes
    groups = GROUPS if c * s.itemsize * job.tile >= GROUPS * least else 1
    each = -(-c // groups)
    panel = each * s.itemsize * job.tile * max(lay.mesh_rows, lay.mesh_cols) // lay.panels
    pieces = max(1, min(each, PIECES, panel // least))
    parts = groups * pieces
    project, output = job.multiplication(groups)
    moved = c * s.itemsize * (lay.tile_rows + lay.tile_cols) * lay.padded
    accumulated = 8 * c * job.tile * lay.panels
    core = job.math(2 * job.tile * lay.padded * c, moved + accumulated)
    loads = panel_loads(lay.mesh_rows, lay.mesh_cols, job.first, route, job.links.node)
    wire, raw = ([c * lay.shard**2 * w] * 2 for w in (s.travels(s.itemsize), s.itemsize))
    steps = [job.transfers(x, wire, raw, parts) for x in loads]
    out = []
    for rank, mine in enumerate(zip(*steps, strict=True)):
        stream = _streamed(core / (parts * lay.panels), mine * parts)
        got = sum(step[rank].received(wire) for step in loads)
        ends = project + output
        found = Prediction(ends + core, core, parts * sum(mine), ends + stream, got)
        launches = groups * blocks_of_lines(lay, job.first) + parts * lay.panels + 1
        products = parts * lay.panels * (products_of_panel(lay) - 1)
        out.append(job.done(rank, loads, parts, groups, launches, found, 0, products))
    return out


def _panel_attention(job: Job, route: str) -> list[Prediction]:
    lay, s, n = job.layout, job.sizes, job.line_chunks()
    bias, project, core, output = job.attention(n, lay.tile_cols if job.first else lay.tile_rows)
    loads = panel_loads(lay.mesh_rows, lay.mesh_cols, job.first, route, job.links.node)
    kv, b = 2 * s.channels * lay.shard**2, n * s.heads * s.itemsize * lay.shard**2
    wire, raw = (kv * s.travels(s.itemsize), b), (kv * s.itemsize, b)
    steps = [job.transfers(x, wire, raw, n) for x in loads]
    ends = bias + project + output
    out = []
    for rank, mine in enumerate(zip(*steps, strict=True)):
        stream = _streamed(core / (n * lay.panels), mine * n)
        got = sum(step[rank].received(wire) for step in loads)
        found = Prediction(ends + core, core, n * sum(mine), ends + stream, got)
        out.append(job.done(rank, loads, n, n, 1 + n * (2 + lay.panels), found))
    return out


def _rows(job: Job) -> list[Prediction]:
    lay, s, n = job.layout, job.sizes, job.line_chunks()
    bias, project, core, output = job.attention(n, lay.padded)
    x = s.channels * lay.shard**2
    ends = bias + job.math(0, job.tile * s.channels * (s.z_itemsize + s.itemsize))  # LayerNorm
    mesh = lay.mesh_rows, lay.mesh_cols, job.first, job.links.node
    lines, panels = line_loads(*mesh), bias_loads(*mesh)
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
        found = Prediction(ends + under, under, moving, total, got)
        steps_of_chunk = [lines, lines, *panels]
        out.append(job.done(rank, steps_of_chunk, n, 3 * n, 1 + n * (3 + lay.panels), found))
    return out


def _channel(job: Job) -> list[Prediction]:
    lay, s, size = job.layout, job.sizes, job.layout.size
    widths = channel_widths(lay, s.channels, job.chunks)
    last, each = len(widths) - 1, -(-len(widths) // GROUPS)
    project, output = job.multiplication(-(-len(widths) // each))
    wire, raw = [job.tile * s.travels(s.itemsize)], [job.tile * s.itemsize]
    loads = [channel_loads(size, d, job.links.node) for d in widths]
    there, back = ([job.transfers(x[i], wire, raw) for x in loads] for i in (0, 1))
    plane = lay.padded**2
    # A tile is as many blocks as its sides overlap with rows (columns) of tiles.
    rows, cols = lay.mesh_rows, lay.mesh_cols
    products = (rows if job.first else cols) * (rows + cols - gcd(rows, cols))
    out = []
    for rank in range(size):
        own = [channels_of(rank, size, d) for d in widths]
        maths = [job.math(2 * plane * lay.padded * d, 3 * plane * s.itemsize * d) for d in own]
        core, ends = sum(maths), project + output
        total = ends + there[0][rank] + back[last][rank]
        for i in range(len(widths)):
            beside = (there[i + 1][rank] if i < last else 0) + (back[i - 1][rank] if i else 0)
            total += max(maths[i], beside)
        moving = sum(x[rank] for x in (*there, *back))
        got = sum(load[rank].received(wire) for both in loads for load in both)
        found = Prediction(ends + core, core, moving, total, got)
        steps = [step for both in loads for step in both]
        launches = -(-len(widths) // each) + len(widths) + 1
        # Each channel of a and b is a transfer, of what a rank receives and as much that it sends.
        more = sum((2 * d - 1) * 2 * (size - 1) for d in own if d)
        done = 2 * len(widths), launches, found, more, products * len(widths)
        out.append(job.done(rank, steps, 1, *done))
    return out


def of_ranks(op: str, name: str, job: Job) -> list[Prediction]:
    """Model an op on every rank of its mesh.

    Args:
        op: "triangle_multiplication" or "triangle_attention".
        name: a strategy of it.
        job: what it runs with.

    Returns:
        A prediction for each rank, in their order.
    """
    route = name.removeprefix("panel-")
    if op == MULTIPLICATION:
        return _channel(job) if name == "channel" else _panel_multiplication(job, route)
    return _rows(job) if name == "rows" else _panel_attention(job, route)
