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
from foldcp_kernels.attention import Carry
from foldcp_kernels.chunking import add_chunks, chunk_length, spans
from foldcp_kernels.triangle_attention import (
    TriangleAttentionWeights,
    attend_panel,
    gated_output,
    project_bias,
    project_lines,
)

_MESH_CHUNKS = 16  # chunks of lines on a mesh: each re-fetches the bias, so not too many


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
    bias = project_bias(z, w)
    dim = 1 if starting else 2
    lines = z.shape[dim]
    width = 10 * z.shape[0] * z.shape[3 - dim] * w.q.shape[0] * z.element_size()
    step = chunk_length(lines, width, z.device, at_most=_MESH_CHUNKS if layout.size > 1 else 0)
    updates = (
        ((lo, hi), _lines(z, mask, bias, w, starting, (lo, hi), layout, mesh))
        for lo, hi in spans(lines, step)
    )
    return add_chunks(z, dim, updates)


def _lines(
    z: Tensor,
    mask: Tensor | None,
    bias: Tensor,
    w: TriangleAttentionWeights,
    starting: bool,
    chunk: Span,
    layout: PairLayout,
    mesh: Mesh,
) -> Tensor:
    """The update of one chunk of lines, in tile orientation."""
    dim, (lo, hi) = (1 if starting else 2), chunk
    x = z.narrow(dim, lo, hi - lo)
    keep = None if mask is None else mask.narrow(dim, lo, hi - lo)
    if not starting:
        x, keep = x.transpose(1, 2), None if keep is None else keep.transpose(1, 2)
    x = w.norm(x)
    q, kv = project_lines(x, keep, w)
    plan = triangle_attention_plan(layout, starting, chunk, mesh.route)
    # kv is [B, lines, positions, ..]: for the ending node box rows are positions.
    dims = ((1, 2) if starting else (2, 1), (1, 2))
    carry: Carry | None = None
    for step, (kv_p, bias_p) in _panels(mesh, plan, (kv, bias), dims):
        keys = layout.valid(layout.panel_span(layout.panel_at(layout.rank, step)))
        if keys == 0:
            continue
        b = bias_p.permute(0, 3, 1, 2) if starting else bias_p.permute(0, 3, 2, 1)
        carry = attend_panel(q, kv_p[:, :, :keys], b[..., :keys], mask is not None, carry)
    assert carry is not None
    update = gated_output(x, carry[0], w)
    return update if starting else update.transpose(1, 2)


def _panels(mesh: Mesh, plan, sources, dims) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    return enumerate(stream(mesh, plan, sources, dims, "triangle_attention"))
