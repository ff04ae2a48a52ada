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

Backward: the gradients of k, v and the bias are added up at their owners.
"""

from __future__ import annotations

from torch import Tensor

from foldcp.cost import strategy
from foldcp.exchange import stream
from foldcp.layout import PairLayout, Span
from foldcp.mesh import Mesh
from foldcp.plans import key_panels, triangle_attention_plan
from foldcp.rings.row_attention import row_attention
from foldcp_kernels.carry import Carry
from foldcp_kernels.chunking import map_chunks
from foldcp_kernels.dispatch import compute_dtype
from foldcp_kernels.triangle_attention import (
    TriangleAttentionWeights,
    attend_lines,
    kept,
    line_output,
    lines_per_chunk,
    project_bias,
    project_lines,
)


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
        z: pair tile [B, T_r, T_c, C]. mask: keys, [B, T_r, T_c], 1 = keep, None keeps all real
            tokens (padding is never a key).
        w: weights. starting: Algorithm 14 (True) or 15 (False).
        layout: the tiling. mesh: the mesh.

    Returns:
        The updated tile [B, T_r, T_c, C].

    Raises:
        ValueError: `z` is not this rank's tile.

    Source: AlphaFold 3 supplement, Algorithms 14 and 15; Fold-CP (arXiv 2603.14806).
    """
    layout.check(z)
    sizes = z.element_size(), compute_dtype(z).itemsize
    name = strategy("triangle_attention", layout, mesh, *sizes, z.shape[-1], w.heads)
    if name == "rows":
        return row_attention(z, mask, w, starting, layout, mesh)
    route = name.removeprefix("panel-")
    keys = kept(mask)
    dim = 1 if starting else 2
    # The bias lies as the lines read it: [B, H, T_r, T_c], or for the ending node its transpose.
    bias = project_bias(z if starting else z.transpose(1, 2), w)
    step = lines_per_chunk(z, dim, w, layout.size > 1)

    def update(x: Tensor, chunk: Span) -> Tensor:
        keep = None if keys is None else keys.narrow(dim, chunk[0], chunk[1] - chunk[0])
        if starting:
            return _lines(x, keep, bias, w, starting, chunk, layout, mesh, route)
        keep = None if keep is None else keep.transpose(1, 2)
        x = _lines(x.transpose(1, 2), keep, bias, w, starting, chunk, layout, mesh, route)
        return x.transpose(1, 2)

    return map_chunks(z, dim, step, update)


def _lines(
    x: Tensor,
    keep: Tensor | None,
    bias: Tensor,
    w: TriangleAttentionWeights,
    starting: bool,
    chunk: Span,
    layout: PairLayout,
    mesh: Mesh,
    route: str,
) -> Tensor:
    """One chunk of lines [B, lines, positions, C] with its update, in place without gradients."""
    mine = project_lines(x, w)
    plan = triangle_attention_plan(layout, starting, chunk, route, keep is not None)
    # Boxes are (rows, columns) of the tile: for the ending node, rows are positions.
    keys, pairs = ((1, 2), (2, 3)) if starting else ((2, 1), (3, 2))
    sources, dims, wires = [mine.kv, bias], [keys, pairs], [mesh.wire, "raw"]
    if keep is not None:
        sources, dims, wires = [*sources, keep], [*dims, keys], [*wires, "raw"]
    panels = key_panels(layout)
    last = max(t for t, (lo, hi) in enumerate(panels) if lo < hi)
    carry: Carry | None = None
    regions = stream(mesh, plan, sources, dims, "triangle_attention", wires)
    for step, (kv, b, *rest) in enumerate(regions):
        count = panels[step][1] - panels[step][0]
        if count == 0:
            continue
        kv, b, masks = kv[:, :, :count], b[..., :count], [x[:, :, :count] for x in rest]
        carry = attend_lines(mine, kv, b, masks[0] if masks else None, carry, step == last)
    assert carry is not None
    return line_output(x, carry, w)
