"""Triangle multiplication over channels: each rank contracts all pairs of its share of them.

The D channels are cut in chunks; the planes a and b of a chunk go to the ranks of their channels,
are contracted there over all k, and the result goes back to the tiles. On a 2x3
mesh with 12 channels in chunks of 6, rank i holds in step 0 channel i and in step 1 channel 6 + i:

    step   sends of its tile                receives             back from rank j
    0      a, b of channel j to rank j      a, b of channel i    channel j of its tile
    1      a, b of channel 6 + j            a, b of 6 + i        channel 6 + j of its tile

Planes have k first: for the outgoing update a tile's are transposed, [d, T_c, T_r], and a rank
holds [d, N, T_r] of each row of tiles, so that a channel of a tile is one run of memory at both
ends. Each tile of the result is a product of its own, contiguous as it goes back.

Backward: results and planes go the same ways in reverse; every element has one receiver.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from foldcp.fabric.exchange import timeline
from foldcp.fabric.exchange.pipeline import Move, ahead, behind
from foldcp.fabric.mesh import Mesh
from foldcp.layout.cuts import share_of_channels
from foldcp.layout.strategies import (
    MULTIPLICATION,
    channel_multiplication,
    channel_plans,
)
from foldcp.layout.tiles import PairLayout, Span
from foldcp.layout.triangle_plans import tile_patches
from foldcp.planner.choice import chunks_taken, sizes_on
from foldcp_kernels.core.chunking import chunk_bytes
from foldcp_kernels.core.dispatch import compute_dtype
from foldcp_kernels.triangle_attention.parts import swapped
from foldcp_kernels.triangle_multiplication import TriangleMultiplicationWeights
from foldcp_kernels.triangle_multiplication.contraction import contract
from foldcp_kernels.triangle_multiplication.fp8 import Scaled
from foldcp_kernels.triangle_multiplication.parts import Parts, project_planes, scaled_planes

LABEL = "triangle_multiplication"


def channel_chunks(z: Tensor, channels: int, layout: PairLayout, mesh: Mesh) -> list[list[Span]]:
    """Cut channels in chunks, by the groups whose planes are projected together.

    Args:
        z: pair tile [B, T_r, T_c, C].
        channels: D.
        layout: the tiling.
        mesh: the mesh.
    """
    sizes = sizes_on(layout, mesh, z.element_size(), compute_dtype(z).itemsize, channels)
    count = chunks_taken(MULTIPLICATION, "channel", layout, mesh, sizes, chunk_bytes(z.device))
    return channel_multiplication(layout, channels, count, sizes.lean)


def channel_products(
    z: Tensor,
    mask: Tensor | None,
    w: TriangleMultiplicationWeights,
    outgoing: bool,
    layout: PairLayout,
    mesh: Mesh,
    parts: Parts,
) -> Iterator[Tensor]:
    """Sum a b of this rank's tile over k, chunk of channels by chunk of channels.

    Args:
        z: pair tile [B, T_r, T_c, C].
        mask: [B, T_r, T_c], as in `triangle_multiplication`.
        w: weights.
        outgoing: Algorithm 12 (True) or 13 (False).
        layout: the tiling.
        mesh: the mesh.
        parts: what runs each part.

    Returns:
        An iterator over [B, d, T_r, T_c].

    Source: docs/design/strategies-and-cost.md.
    """
    groups = channel_chunks(z, w.p_in.shape[0] // 2, layout, mesh)
    x, keep, dims = z, mask, (1, 2, 3)
    if outgoing:
        x, keep, dims = z.transpose(1, 2), swapped(mask), (1, 3, 2)

    def planes() -> Iterator[Move]:
        for group in groups:
            first = group[0][0]
            ab = project_planes(x, keep, w, parts, (first, group[-1][1]))
            half = ab.shape[1] // 2
            for lo, hi in group:
                a, b = (ab[:, i + lo - first : i + hi - first] for i in (0, half))
                yield channel_plans(layout, (lo, hi), outgoing).there, (a, b)
                del a, b
            del ab

    def products() -> Iterator[Move]:
        wire = "raw" if parts.fp8 else mesh.policy.wire  # FP8 planes travel as they are
        there = ahead(mesh, planes(), (dims, dims), LABEL, (wire,) * 2)
        for span in (span for group in groups for span in group):
            regions = next(there)
            lo, hi = share_of_channels(span[1] - span[0], layout.size, layout.rank)
            scaled = scaled_planes(z, w, parts, (span[0] + lo, span[0] + hi))
            with timeline.math(mesh, LABEL, 0):  # exchanges of one step each
                tiles = _tiles(regions, outgoing, layout, scaled)
            del regions
            yield channel_plans(layout, span, outgoing).back, tiles
            del tiles

    size = layout.size
    for (out,) in behind(mesh, products(), ((1, 2, 3),) * size, LABEL, (mesh.policy.wire,) * size):
        yield out


def _tiles(
    planes: tuple[Tensor, ...], outgoing: bool, layout: PairLayout, scaled: Scaled | None
) -> tuple[Tensor, ...]:
    """The products for the tiles of all ranks, [B, d, T_r, T_c] each, of regions with k first."""
    half, out = len(planes) // 2, []
    dtype = planes[0].dtype if scaled is None else scaled.dtype
    for rank in range(layout.size):
        shape = (*planes[0].shape[:2], layout.tile_rows, layout.tile_cols)
        tile = None if torch.is_grad_enabled() else planes[0].new_empty(shape, dtype=dtype)
        rows: list[list[Tensor]] = []
        for (i, rows_of_a, at), (j, cols_of_b, to) in tile_patches(layout, rank, outgoing):
            a = _cut(planes[i], 3, rows_of_a)
            b = _cut(planes[half + j], 3, cols_of_b)
            part = None if tile is None else _cut(_cut(tile, 2, at), 3, to)
            product = contract(None, a, b, False, out=part, scaled=scaled)
            if to[0] == 0:
                rows.append([])
            rows[-1].append(product)
        out.append(torch.cat([torch.cat(r, 3) for r in rows], 2) if tile is None else tile)
    return tuple(out)


def _cut(x: Tensor, dim: int, span: Span) -> Tensor:
    return x if span == (0, x.shape[dim]) else x.narrow(dim, span[0], span[1] - span[0])
