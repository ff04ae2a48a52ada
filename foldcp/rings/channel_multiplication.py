"""Triangle multiplication over channels: each rank contracts all pairs of its share of them.

The D channels are cut in chunks; the planes a and b of a chunk go to the ranks of their channels,
are contracted there in one product over all k, and the result goes back to the tiles. On a 2x3
mesh with 12 channels in chunks of 6, rank i holds in step 0 channel i and in step 1 channel 6 + i:

    step   sends of its tile                receives             back from rank j
    0      a, b of channel j to rank j      a, b of channel i    channel j of its tile
    1      a, b of channel 6 + j            a, b of 6 + i        channel 6 + j of its tile

Backward: results and planes go the same ways in reverse; every element has one receiver.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from torch import Tensor

from foldcp import timeline
from foldcp.cost import GROUPS, MULTIPLICATION, Sizes, chunks_taken
from foldcp.layout import PairLayout, Span
from foldcp.mesh import Mesh
from foldcp.plans import channel_back_plan, channel_plan
from foldcp.rings.pipeline import Move, ahead, behind
from foldcp.traffic import channel_widths
from foldcp_kernels.chunking import chunk_bytes
from foldcp_kernels.dispatch import compute_dtype
from foldcp_kernels.triangle_multiplication import (
    TriangleMultiplicationWeights,
    contract,
    project_planes,
)

LABEL = "triangle_multiplication"
_DIMS = (1, 2, 3)


def channel_chunks(z: Tensor, channels: int, layout: PairLayout, mesh: Mesh) -> list[list[Span]]:
    """Chunks of channels (see `foldcp.cost.chunk_count`) by group.

    The planes of a group are projected together. A projection reads all of z again, in float32 as
    many bytes as a and b of all channels have in bfloat16: one per chunk would do so more often,
    fewer groups would hold more planes at a time.

    Args:
        z: pair tile [B, T_r, T_c, C]. channels: D. layout: the tiling. mesh: the mesh.
    """
    sizes = Sizes(z.element_size(), compute_dtype(z).itemsize, channels, wire=mesh.wire)
    count = chunks_taken(MULTIPLICATION, "channel", layout, mesh, sizes, chunk_bytes(z.device))
    widths = channel_widths(layout, channels, count)
    ends = list(accumulate(widths))
    spans = [(end - width, end) for end, width in zip(ends, widths, strict=True)]
    each = -(-len(spans) // GROUPS)
    return [spans[i : i + each] for i in range(0, len(spans), each)]


def channel_products(
    z: Tensor,
    mask: Tensor | None,
    w: TriangleMultiplicationWeights,
    outgoing: bool,
    layout: PairLayout,
    mesh: Mesh,
) -> Iterator[Tensor]:
    """sum_k a b of this rank's tile, chunk of channels by chunk of channels.

    Args:
        z, mask, w, outgoing, layout, mesh: see `triangle_multiplication`.

    Returns:
        An iterator over [B, d, T_r, T_c].

    Source: foldcp design, section 6.
    """
    groups = channel_chunks(z, w.p_in.shape[0] // 2, layout, mesh)

    def planes() -> Iterator[Move]:
        for group in groups:
            first = group[0][0]
            ab = project_planes(z, mask, w, (first, group[-1][1]))
            half = ab.shape[1] // 2
            for lo, hi in group:
                a, b = (ab[:, i + lo - first : i + hi - first] for i in (0, half))
                yield channel_plan(layout, hi - lo), (a, b)
                del a, b
            del ab

    def products() -> Iterator[Move]:
        there = ahead(mesh, planes(), (_DIMS, _DIMS), LABEL, (mesh.wire,) * 2)
        for lo, hi in (span for group in groups for span in group):
            a, b = next(there)
            with timeline.math(LABEL, 0):  # exchanges of one step each
                x = contract(None, a, b, outgoing)
            del a, b
            yield channel_back_plan(layout, hi - lo), (x,)
            del x

    for (x,) in behind(mesh, products(), (_DIMS,), LABEL, (mesh.wire,)):
        yield x
