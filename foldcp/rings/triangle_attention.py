"""Triangle attention over panels of keys: the loop.

Lines (rows for the starting node, columns for the ending node) are taken chunk by chunk; for each
chunk the panels of k, v come along the line from their owners and the bias panel from its owner.
On a 2x2 mesh (L = 2, rank (r, c) uses panel (t + c + r) mod 2), starting node, step 0 / step 1:

    rank     k, v from      bias (cols_c, panel) from
    (0, 0)   self / (0,1)   self / (0,1)
    (0, 1)   self / (0,0)   (1,1) / (1,0)
    (1, 0)   (1,1) / self   (0,1) / (0,0)
    (1, 1)   (1,0) / self   (1,0) / self

Backward: the gradients of k, v and the bias are added up at their owners.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from foldcp.exchange import stream
from foldcp.layout import PairLayout, Span
from foldcp.mesh import Mesh
from foldcp.plans import triangle_attention_plan
from foldcp_kernels.carry import Carry
from foldcp_kernels.chunking import map_chunks
from foldcp_kernels.triangle_attention import (
    TriangleAttentionWeights,
    attend_lines,
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
    dim = 1 if starting else 2
    # The bias lies as the lines read it: [B, H, T_r, T_c], or for the ending node its transpose.
    bias = project_bias(z if starting else z.transpose(1, 2), w)
    step = lines_per_chunk(z, dim, w, layout.size > 1)

    def update(x: Tensor, chunk: Span) -> Tensor:
        keep = None if mask is None else mask.narrow(dim, chunk[0], chunk[1] - chunk[0])
        if starting:
            return _lines(x, keep, bias, w, starting, chunk, layout, mesh)
        keep = None if keep is None else keep.transpose(1, 2)
        x = _lines(x.transpose(1, 2), keep, bias, w, starting, chunk, layout, mesh)
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
) -> Tensor:
    """One chunk of lines [B, lines, positions, C] with its update, in place without gradients."""
    mine = project_lines(x, keep, w)
    plan = triangle_attention_plan(layout, starting, chunk, mesh.route)
    # Boxes are (rows, columns) of the tile: for the ending node, rows are positions.
    dims = ((1, 2), (2, 3)) if starting else ((2, 1), (3, 2))
    panels = [layout.panel_span(layout.panel_at(layout.rank, t)) for t in range(layout.panels)]
    keys = [layout.valid(panel) for panel in panels]
    last = max(t for t, count in enumerate(keys) if count)
    carry: Carry | None = None
    for step, (kv, b) in _panels(mesh, plan, (mine.kv, bias), dims):
        if keys[step] == 0:
            continue
        kv, b = kv[:, :, : keys[step]], b[..., : keys[step]]
        carry = attend_lines(mine, kv, b, keep is not None, carry, step == last)
    assert carry is not None
    return line_output(x, carry, w)


def _panels(mesh: Mesh, plan, sources, dims) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    return enumerate(stream(mesh, plan, sources, dims, "triangle_attention"))
