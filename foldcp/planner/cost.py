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
from math import gcd

from foldcp.layout.cuts import (
    channel_groups,
    channel_pieces,
    chunks,
    line_chunks,
    products_of_panel,
    share_of_channels,
    strips_of_lines,
)
from foldcp.layout.strategies import (
    ATTENTION,
    MULTIPLICATION,
    channel_multiplication,
)
from foldcp.planner.job import Estimate, Job


def _streamed(math: float, transfers: Sequence[float]) -> float:
    """Seconds of a stream with so much math in each step."""
    return transfers[0] + sum(max(math, t) for t in transfers[1:]) + math


def _panel_multiplication(job: Job, name: str) -> list[Estimate]:
    lay, s, c = job.layout, job.sizes, job.sizes.channels
    spans = channel_groups(lay, c, s.plane_itemsize, job.chunk_bytes, s.lean)
    groups = len(spans)
    pieces = channel_pieces(lay, spans[0][1] - spans[0][0], s.plane_itemsize, job.chunk_bytes)
    parts = groups * pieces
    project, output = job.multiplication(groups)
    moved = c * s.plane_itemsize * (lay.tile_rows + lay.tile_cols) * lay.padded
    accumulated = 8 * c * job.tile * lay.panels
    core = job.contraction(2 * job.tile * lay.padded * c, moved + accumulated)
    (loads,) = job.loads(MULTIPLICATION, name)
    wire, raw = ([c * lay.shard**2 * w] for w in (s.plane_travels, s.plane_itemsize))
    steps = [job.transfers(x, wire, raw, parts) for x in loads]
    out = []
    for rank, mine in enumerate(zip(*steps, strict=True)):
        stream = _streamed(core / (parts * lay.panels), mine * parts)
        got = sum(step[rank].received(wire) for step in loads)
        ends = project + output
        found = Estimate(ends + core, core, parts * sum(mine), ends + stream, got)
        launches = groups * strips_of_lines(lay, job.first) + parts * lay.panels + 1
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
    grouped = channel_multiplication(lay, s.channels, job.chunks, s.lean)
    widths = [hi - lo for group in grouped for lo, hi in group]
    last = len(widths) - 1
    project, output = job.multiplication(len(grouped))
    # Planes go there, products come back.
    wire = [[lay.shard**2 * w] for w in (s.plane_travels, s.travels(s.itemsize))]
    raw = [[lay.shard**2 * e] for e in (s.plane_itemsize, s.itemsize)]
    moves = [load for (load,) in job.loads(MULTIPLICATION, "channel")]
    loads = list(zip(moves[::2], moves[1::2], strict=True))
    there, back = ([job.transfers(x[i], wire[i], raw[i]) for x in loads] for i in (0, 1))
    plane = lay.padded**2
    # A tile is as many patches as its sides overlap with rows (columns) of tiles.
    rows, cols = lay.mesh_rows, lay.mesh_cols
    products = (rows if job.first else cols) * (rows + cols - gcd(rows, cols))
    out, moved = [], 2 * s.plane_itemsize + s.itemsize
    for rank in range(size):
        shares = [share_of_channels(d, size, rank) for d in widths]
        own = [hi - lo for lo, hi in shares]
        maths = [job.contraction(2 * plane * lay.padded * d, plane * moved * d) for d in own]
        core, ends = sum(maths), project + output
        total = ends + there[0][rank] + back[last][rank]
        for i in range(len(widths)):
            beside = (there[i + 1][rank] if i < last else 0) + (back[i - 1][rank] if i else 0)
            total += max(maths[i], beside)
        moving = sum(x[rank] for x in (*there, *back))
        got = sum(both[i][rank].received(wire[i]) for both in loads for i in (0, 1))
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
