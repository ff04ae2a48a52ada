"""Choose the strategy of a triangle op, and its number of chunks, by the cost model.

An op is cut in as many chunks as memory asks for, and in more where that takes less time.

Source: docs/design/strategies-and-cost.md.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from foldcp.fabric.memory import device_bytes
from foldcp.layout.cuts import chunk_counts, is_lean, tiles_held
from foldcp.layout.strategies import ATTENTION, MULTIPLICATION, Sizes
from foldcp.layout.tiles import PairLayout
from foldcp.planner.cost import of_ranks
from foldcp.planner.job import CHUNK_BYTES, Estimate, Job
from foldcp.planner.rates import CPU, H100, HOPPER, ONE_MACHINE, Chip, Links
from foldcp_kernels.core.chunking import chunk_bytes

if TYPE_CHECKING:
    from foldcp.fabric.mesh import Mesh

# Bytes: parameters (2.0e9), the CUDA context, alignments, what an allocator cannot use.
_BESIDE = 6_000_000_000
_AS_GOOD = 1.03  # more chunks must save more than the model is good for


def estimate(
    op: str,
    name: str,
    layout: PairLayout,
    sizes: Sizes = Sizes(),  # noqa: B008
    chip: Chip = H100,
    links: Links = HOPPER,
    first: bool = True,
    count: int = 0,
    chunk_bytes: int = CHUNK_BYTES,
) -> Estimate:
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
        chunk_bytes: largest temporary of a chunk (FOLDCP_CHUNK_MB).

    Source: docs/design/strategies-and-cost.md.
    """
    shape = layout.mesh_rows, layout.mesh_cols
    count = count or chunk_count(op, name, layout.padded, shape, sizes, chip, links, chunk_bytes)
    ranks = of_ranks(op, name, Job(layout, sizes, chip, links, first, count, chunk_bytes))
    slowest = max(ranks, key=lambda r: r.total_s)
    return replace(slowest, received_bytes=sum(r.received_bytes for r in ranks) / len(ranks))


def received(
    op: str, name: str, layout: PairLayout, sizes: Sizes, first: bool = True, count: int = 0
) -> tuple[int, ...]:
    """Return the bytes that each rank receives on the wire.

    Args:
        op: as of `estimate`.
        name: as of `estimate`.
        layout: as of `estimate`.
        sizes: as of `estimate`.
        first: as of `estimate`.
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
    chunk_bytes: int = CHUNK_BYTES,
) -> int:
    """Return the number of chunks to cut an op in: the fewest with about the least time.

    There are as many at least as `chunk_counts` asks for, and four times as many at most.

    Args:
        op: as of `estimate`.
        name: as of `estimate`.
        sizes: as of `estimate`.
        chip: as of `estimate`.
        links: as of `estimate`.
        n: tokens, padded.
        shape: of the mesh.
        chunk_bytes: largest temporary of a chunk.
    """
    layout = PairLayout(n, *shape, 0)
    if name not in ("channel", "rows") and op == MULTIPLICATION:
        return 1
    elements = layout.tile_rows * layout.tile_cols * sizes.channels
    bytes_of = sizes.z_itemsize * elements, sizes.itemsize * elements
    fewest, most = chunk_counts(name, layout, *bytes_of, chunk_bytes, sizes.lean)

    def seconds(count: int) -> float:
        jobs = (
            Job(layout, sizes, chip, links, first, count, chunk_bytes) for first in (True, False)
        )
        return sum(max(r.total_s for r in of_ranks(op, name, job)) for job in jobs)

    found = {count: seconds(count) for count in (min(most, fewest * i) for i in (1, 2, 4))}
    return min(c for c, s in found.items() if s <= _AS_GOOD * min(found.values()))


def chunks_taken(
    op: str, name: str, layout: PairLayout, mesh: Mesh, sizes: Sizes, largest: int
) -> int:
    """Return `chunk_count` on a mesh, alike on all ranks.

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
    return chunk_count(op, name, layout.padded, shape, sizes, chip, links, largest)


def strategy(
    op: str,
    layout: PairLayout,
    mesh: Mesh,
    z_itemsize: int,
    itemsize: int,
    channels: int = 128,
    heads: int = 4,
) -> str:
    """Return the strategy that a triangle op runs with, alike on all ranks.

    Args:
        op: "triangle_multiplication" or "triangle_attention".
        layout: the tiling.
        mesh: the mesh.
        z_itemsize: bytes of an element of z.
        itemsize: bytes of an element of the dtype that the op computes in.
        channels: channels of the op.
        heads: heads of the op.

    Returns:
        What the mesh names, or for "auto" the cheapest over both directions of the op, in lean
        memory of those that stay within it. On GPUs that is by the figures of an H100 with NVLink
        4: those of a rank's own might not be its peers'.

    Raises:
        ValueError: there is no such op.

    Source: docs/design/strategies-and-cost.md.
    """
    if op not in (MULTIPLICATION, ATTENTION):
        raise ValueError(f"`op` must be {MULTIPLICATION!r} or {ATTENTION!r}, got {op!r}")
    asked = mesh.policy.multiplication if op == MULTIPLICATION else mesh.policy.attention
    if layout.size == 1 or asked != "auto":
        return "panel-direct" if layout.size == 1 else asked
    sizes = sizes_on(layout, mesh, z_itemsize, itemsize, channels, heads)
    shape, on_cpu = (layout.mesh_rows, layout.mesh_cols), mesh.device.type == "cpu"
    largest = chunk_bytes(mesh.device)
    return cheapest(op, layout.padded, shape, mesh.policy.route, sizes, on_cpu, largest)


@lru_cache
def cheapest(
    op: str,
    n: int,
    shape: tuple[int, int],
    route: str,
    sizes: Sizes,
    on_cpu: bool = False,
    largest: int = CHUNK_BYTES,
) -> str:
    """Return the strategy with the least time for both directions of an op.

    In lean memory panels are taken where the other strategy holds too much in any number of chunks.

    Args:
        op: as of `strategy`.
        n: tokens, padded.
        shape: of the mesh.
        route: of panels.
        sizes: of the op.
        on_cpu: by the figures of CPUs, else of H100 GPUs.
        largest: bytes of a chunk.
    """
    layout = PairLayout(n, *shape, 0)
    chip, links = (CPU, ONE_MACHINE) if on_cpu else (H100, HOPPER)

    def seconds(name: str) -> float:
        both = (
            estimate(op, name, layout, sizes, chip, links, first, 0, largest)
            for first in (True, False)
        )
        return sum(p.total_s for p in both)

    other = "channel" if op == MULTIPLICATION else "rows"
    if sizes.lean:
        count = chunk_count(op, other, n, shape, sizes, chip, links, largest)
        tile = sizes.itemsize * sizes.channels * layout.tile_rows * layout.tile_cols
        if not is_lean(other, layout, count, tile, largest):
            return f"panel-{route}"
    return min((f"panel-{route}", other), key=seconds)


def sizes_on(
    layout: PairLayout,
    mesh: Mesh,
    z_itemsize: int,
    itemsize: int,
    channels: int = 128,
    heads: int = 4,
) -> Sizes:
    """Return the sizes of an op on a mesh, with the mesh's wire, memory and contraction.

    Args:
        layout: the tiling.
        mesh: the mesh.
        z_itemsize: bytes of an element of z.
        itemsize: bytes of an element of the dtype that the op computes in.
        channels: of the op.
        heads: of the op.
    """
    policy = mesh.policy
    held = lean(layout, mesh)
    return Sizes(z_itemsize, itemsize, channels, heads, policy.wire, held, policy.contraction)


def lean(layout: PairLayout, mesh: Mesh) -> bool:
    """Tell whether an input runs in lean memory: as asked for, else where fast memory is short.

    Args:
        layout: the tiling.
        mesh: the mesh; "auto" is fast on CPUs, whose memory is the host's anyway.

    Source: docs/design/strategies-and-cost.md.
    """
    if mesh.policy.memory != "auto":
        return mesh.policy.memory == "lean"
    there = device_bytes(mesh)
    shape = layout.mesh_rows, layout.mesh_cols
    return there is not None and fast_bytes(layout.padded, shape, mesh.policy.route) > there


@lru_cache
def fast_bytes(n: int, shape: tuple[int, int], route: str) -> int:
    """Estimate the memory of a rank in the fast mode of Boltz-2, in bfloat16 on a GPU.

    Its peak is in the MSA module: z twice, what a triangle op holds, and `_BESIDE`.

    Args:
        n: tokens, padded.
        shape: of the mesh.
        route: of panels.
    """
    layout, sizes = PairLayout(n, *shape, 0), Sizes()
    held = 3.0 if layout.size == 1 else 2.25  # planes of all channels or two groups, and product
    for op in (MULTIPLICATION, ATTENTION):
        name = cheapest(op, n, shape, route, sizes) if layout.size > 1 else ""
        if name in ("channel", "rows"):
            held = max(held, tiles_held(name, layout, chunk_count(op, name, n, shape, sizes)))
    pairs = layout.tile_rows * layout.tile_cols * sizes.channels
    return round(pairs * (2 * sizes.z_itemsize + held * sizes.itemsize)) + _BESIDE
