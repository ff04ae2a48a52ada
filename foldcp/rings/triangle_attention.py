"""Triangle attention over panels of keys: the loop.

Lines (rows for the starting node, columns for the ending node) are taken chunk by chunk; for each
chunk the panels of k, v (and the mask) come along the line from their owners and the bias panel
from its owner.
On a 2x2 mesh (L = 2, rank (r, c) uses panel (t + c + r) mod 2), starting node, step 0 / step 1:

    rank     k, v from      bias (cols_c, panel) from
    (0, 0)   self / (0,1)   self / (0,1)
    (0, 1)   self / (0,0)   (1,1) / (1,0)
    (1, 0)   (1,1) / self   (0,1) / (0,0)
    (1, 1)   (1,0) / self   (1,0) / self

The first panels of the next chunk are under way while the last ones of a chunk are used.
Backward: the gradients of k, v and the bias are added up at their owners.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from torch import Tensor

from foldcp.fabric.exchange.autograd import Dims
from foldcp.fabric.exchange.pipeline import Move, Regions, chained
from foldcp.fabric.mesh import Mesh
from foldcp.layout.tiles import PairLayout, Span
from foldcp.layout.triangle_plans import key_panels, triangle_attention_plan
from foldcp.planner.choice import chunks_taken, strategy
from foldcp.planner.cost import ATTENTION, Sizes
from foldcp.rings.row_attention import row_attention
from foldcp_kernels.attention.carry import Carry
from foldcp_kernels.core import chunking
from foldcp_kernels.core.chunking import chunk_bytes, map_chunks
from foldcp_kernels.core.dispatch import compute_dtype
from foldcp_kernels.core.recompute import nothing
from foldcp_kernels.triangle_attention import (
    TriangleAttentionWeights,
    attend_lines,
    key_mask,
    least_chunks,
    line_output,
    lines_per_chunk,
)
from foldcp_kernels.triangle_attention.lines import Lines, bias_panels, project_lines


def triangle_attention(
    z: Tensor,
    mask: Tensor | None,
    w: TriangleAttentionWeights,
    starting: bool,
    layout: PairLayout,
    mesh: Mesh,
) -> Tensor:
    """z + TriangleAttention(z) on tiles; in place when gradients are off.

    Args:
        z: pair tile [B, T_r, T_c, C].
        mask: keys, [B, T_r, T_c], bool or any number from 0 to 1, see
            `foldcp_kernels.triangle_attention`; None keeps all real tokens (padding is never a
            key).
        w: weights.
        starting: Algorithm 14 (True) or 15 (False).
        layout: the tiling.
        mesh: the mesh.

    Returns:
        The updated tile [B, T_r, T_c, C].

    Raises:
        ValueError: `z` is not this rank's tile, or a shape or dtype does not fit it.

    Source: AlphaFold 3 supplement, Algorithms 14 and 15; Fold-CP (arXiv 2603.14806).
    """
    mesh.check(z, layout)
    mesh.fits("triangle_attention tile", z, mask, *w.tensors(), H=w.heads)
    if not z.numel():
        return nothing(z, *w.tensors())
    sizes = z.element_size(), compute_dtype(z).itemsize
    name = strategy("triangle_attention", layout, mesh, *sizes, z.shape[-1], w.heads)
    if name == "rows":
        return row_attention(z, mask, w, starting, layout, mesh)
    route = name.removeprefix("panel-")
    dim, keep = (1 if starting else 2), key_mask(mask)
    own_panels = layout.panels_of(starting)
    # The bias lies as the lines read it: [B, H, T_r, panel], or for the ending node its transpose.
    bias = bias_panels(z if starting else z.transpose(1, 2), w, own_panels)
    if layout.size == 1:
        length = lines_per_chunk(z, dim, w)
    else:
        made = Sizes(*sizes, w.q.shape[0], w.heads, mesh.policy.wire)
        count = chunks_taken(ATTENTION, name, layout, mesh, made, chunk_bytes(z.device))
        length = -(-z.shape[dim] // max(count, least_chunks(z, dim, w)))
    projected: deque[Lines] = deque()

    def moves() -> Iterator[Move]:
        for lo, hi in chunking.spans(z.shape[dim], length):
            x = z.narrow(dim, lo, hi - lo)
            x = x if starting else x.transpose(1, 2)
            projected.append(project_lines(x, w, panels=own_panels))
            plan = triangle_attention_plan(layout, starting, (lo, hi), route, keep is not None)
            keys = () if keep is None else _key_panels(keep.narrow(dim, lo, hi - lo))
            yield plan, (*projected[-1].kv, *bias, *keys)

    def _key_panels(keep: Tensor) -> tuple[Tensor, ...]:
        keep = keep if starting else keep.transpose(1, 2)
        return tuple(k.contiguous() for k in keep.chunk(own_panels, 2))

    # Boxes are (rows, columns) of the tile: for the ending node, rows are positions.
    keys, pairs = ((1, 2), (2, 3)) if starting else ((2, 1), (3, 2))
    kinds = ((keys, mesh.policy.wire), (pairs, "raw"), (keys, "raw"))[: 2 if keep is None else 3]
    dims: list[Dims] = [d for d, _ in kinds for _ in range(own_panels)]
    wires = [wire for _, wire in kinds for _ in range(own_panels)]
    panels = chained(mesh, moves(), dims, "triangle_attention", wires)

    def update(x: Tensor, chunk: Span) -> Tensor:
        if starting:
            return _lines(x, panels, projected, w, layout)
        return _lines(x.transpose(1, 2), panels, projected, w, layout).transpose(1, 2)

    out = map_chunks(z, dim, length, update)
    assert next(panels, None) is None  # the last exchange ends
    return out


def _lines(
    x: Tensor,
    panels: Iterator[Regions],
    projected: deque[Lines],
    w: TriangleAttentionWeights,
    layout: PairLayout,
) -> Tensor:
    """One chunk of lines [B, lines, positions, C] with its update, in place without gradients."""
    spans_of_keys = key_panels(layout)
    last = max(t for t, (lo, hi) in enumerate(spans_of_keys) if lo < hi)
    carry: Carry | None = None
    for step, (lo, hi) in enumerate(spans_of_keys):
        kv, b, *rest = next(panels)
        if lo == hi:
            continue
        kv, b, masks = kv[:, :, : hi - lo], b[..., : hi - lo], [m[:, :, : hi - lo] for m in rest]
        carry = attend_lines(projected[0], kv, b, masks[0] if masks else None, carry, step == last)
    assert carry is not None
    projected.popleft()
    return line_output(x, carry, w)
