"""Which strategy a triangle op runs with, and in how many chunks, by the cost model.

An op is cut in as many chunks as memory asks for, and in more where that takes less time.

Source: docs/design/strategies-and-cost.md.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from foldcp.layout.tiles import PairLayout
from foldcp.planner.cost import ATTENTION, MULTIPLICATION, Job, Prediction, Sizes, of_ranks
from foldcp.planner.rates import CPU, H100, HOPPER, ONE_MACHINE, Chip, Links

if TYPE_CHECKING:
    from foldcp.fabric.mesh import Mesh

# Chunks of channels and of lines, at most. Each chunk of lines fetches its part of the bias again,
# of `rows` the whole bias, H N^2 elements: P / 32 tiles at 4 heads and 128 channels.
_MOST_CHUNKS, _MOST_LINE_CHUNKS = 16, 8
_AS_GOOD = 1.03  # more chunks must save more than the model is good for


def predict(
    op: str,
    name: str,
    layout: PairLayout,
    sizes: Sizes = Sizes(),  # noqa: B008
    chip: Chip = H100,
    links: Links = HOPPER,
    first: bool = True,
    count: int = 0,
) -> Prediction:
    """The modelled cost of one triangle op.

    Args:
        op: "triangle_multiplication" or "triangle_attention".
        name: a strategy of it.
        layout: the tiling, of any rank.
        sizes: element sizes, channels and heads of the op.
        chip: the processor of each rank.
        links: the network between them.
        first: outgoing or starting; False is incoming or ending.
        count: of chunks of lines or channels; 0 is what the rings take.

    Source: docs/design/strategies-and-cost.md.
    """
    shape = layout.mesh_rows, layout.mesh_cols
    count = count or chunk_count(op, name, layout.padded, shape, sizes, chip, links)
    ranks = of_ranks(op, name, Job(layout, sizes, chip, links, first, count))
    slowest = max(ranks, key=lambda r: r.total_s)
    return replace(slowest, received_bytes=sum(r.received_bytes for r in ranks) / len(ranks))


def received(
    op: str, name: str, layout: PairLayout, sizes: Sizes, first: bool = True, count: int = 0
) -> tuple[int, ...]:
    """Bytes that each rank receives on the wire.

    Args:
        op: as of `predict`.
        name: as of `predict`.
        layout: as of `predict`.
        sizes: as of `predict`.
        first: as of `predict`.
        count: chunks of lines or channels; 0 is what GPUs take.
    """
    shape = layout.mesh_rows, layout.mesh_cols
    count = count or chunk_count(op, name, layout.padded, shape, sizes)
    job = Job(layout, sizes, H100, HOPPER, first, count)
    return tuple(round(r.received_bytes) for r in of_ranks(op, name, job))


@lru_cache(maxsize=4096)
def chunk_count(
    op: str,
    name: str,
    n: int,
    shape: tuple[int, int],
    sizes: Sizes,
    chip: Chip = H100,
    links: Links = HOPPER,
    least: int = 0,
) -> int:
    """In how many chunks of lines or channels an op is cut: the fewest with about the least time.

    There are as many at least as keep what a chunk takes within a quarter of z, or within `least`,
    and four times as many at most.

    Args:
        op: as of `predict`.
        name: as of `predict`.
        sizes: as of `predict`.
        chip: as of `predict`.
        links: as of `predict`.
        n: tokens, padded.
        shape: of the mesh.
        least: bytes below which no memory is saved; 0 is six pieces of the chip.
    """
    layout = PairLayout(n, *shape, 0)
    if name not in ("channel", "rows") and op == MULTIPLICATION:
        return 1
    # a, b and product, which travel both ways at a time; or q, k, v and o.
    operands = 6 if name == "channel" else 4
    elements = layout.tile_rows * layout.tile_cols * sizes.channels
    limit = max(least or 6 * chip.piece_bytes, sizes.z_itemsize * elements // 4)
    most = _MOST_CHUNKS if name == "channel" else _MOST_LINE_CHUNKS
    if name == "rows":
        most = max(2, min(most, 64 // layout.size))
    fewest = min(most, -(-operands * sizes.itemsize * elements // limit))

    def seconds(count: int) -> float:
        jobs = (Job(layout, sizes, chip, links, first, count) for first in (True, False))
        return sum(max(r.total_s for r in of_ranks(op, name, job)) for job in jobs)

    found = {count: seconds(count) for count in (min(most, fewest * i) for i in (1, 2, 4))}
    return min(c for c, s in found.items() if s <= _AS_GOOD * min(found.values()))


def chunks_taken(
    op: str, name: str, layout: PairLayout, mesh: Mesh, sizes: Sizes, largest: int
) -> int:
    """`chunk_count` on a mesh, alike on all ranks.

    Args:
        op: as there.
        name: as there.
        sizes: as there.
        layout: the tiling, as of `strategy`.
        mesh: the mesh, as of `strategy`.
        largest: bytes of a chunk, as `foldcp_kernels.core.chunking.chunk_bytes` has them.
    """
    chip, links = (CPU, ONE_MACHINE) if mesh.device.type == "cpu" else (H100, HOPPER)
    shape = layout.mesh_rows, layout.mesh_cols
    return chunk_count(op, name, layout.padded, shape, sizes, chip, links, 3 * largest // 4)


def strategy(
    op: str,
    layout: PairLayout,
    mesh: Mesh,
    z_itemsize: int,
    itemsize: int,
    channels: int = 128,
    heads: int = 4,
) -> str:
    """The strategy that a triangle op runs with, alike on all ranks.

    Args:
        op: "triangle_multiplication" or "triangle_attention".
        layout: the tiling.
        mesh: the mesh.
        z_itemsize: bytes of an element of z.
        itemsize: bytes of an element of the dtype that the op computes in.
        channels: channels of the op.
        heads: heads of the op.

    Returns:
        What the mesh names, or for "auto" the cheapest over both directions of the op. On GPUs that
        is by the figures of an H100 with NVLink 4: those of a rank's own might not be its peers'.

    Raises:
        ValueError: there is no such op.

    Source: docs/design/strategies-and-cost.md.
    """
    if op not in (MULTIPLICATION, ATTENTION):
        raise ValueError(f"`op` must be {MULTIPLICATION!r} or {ATTENTION!r}, got {op!r}")
    asked = mesh.policy.multiplication if op == MULTIPLICATION else mesh.policy.attention
    if layout.size == 1 or asked != "auto":
        return "panel-direct" if layout.size == 1 else asked
    sizes = Sizes(z_itemsize, itemsize, channels, heads, mesh.policy.wire)
    shape, on_cpu = (layout.mesh_rows, layout.mesh_cols), mesh.device.type == "cpu"
    return cheapest(op, layout.padded, shape, mesh.policy.route, sizes, on_cpu)


@lru_cache
def cheapest(
    op: str, n: int, shape: tuple[int, int], route: str, sizes: Sizes, on_cpu: bool = False
) -> str:
    """The strategy with the least time for both directions of an op.

    Args:
        op: as of `strategy`.
        n: tokens, padded.
        shape: of the mesh.
        route: of panels.
        sizes: of the op.
        on_cpu: by the figures of CPUs, else of H100 GPUs.
    """
    layout = PairLayout(n, *shape, 0)
    chip, links = (CPU, ONE_MACHINE) if on_cpu else (H100, HOPPER)

    def seconds(name: str) -> float:
        both = (predict(op, name, layout, sizes, chip, links, first) for first in (True, False))
        return sum(p.total_s for p in both)

    return min((f"panel-{route}", "channel" if op == MULTIPLICATION else "rows"), key=seconds)
