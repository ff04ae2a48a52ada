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

from collections.abc import Iterator

import torch
from torch import Tensor

from foldcp.fabric.exchange.autograd import Dims
from foldcp.fabric.exchange.pipeline import Regions, chained
from foldcp.fabric.mesh import Mesh
from foldcp.layout.schedule import Plan
from foldcp.layout.strategies import ATTENTION, panel_attention
from foldcp.layout.tiles import PairLayout, Span
from foldcp.layout.triangle_plans import key_panels, last_key_step
from foldcp.planner.choice import chunks_taken, sizes_on, strategy
from foldcp.rings.row_attention import LABEL, row_attention
from foldcp_kernels.attention.carry import Carry
from foldcp_kernels.core.chunking import chunk_bytes
from foldcp_kernels.core.dispatch import compute_dtype
from foldcp_kernels.core.recompute import nothing
from foldcp_kernels.triangle_attention import TriangleAttentionWeights
from foldcp_kernels.triangle_attention.choice import Parts, chosen, least_chunks, lines_per_chunk
from foldcp_kernels.triangle_attention.cuequivariance import prepare
from foldcp_kernels.triangle_attention.parts import (
    Lines,
    attend_lines,
    bias_panels,
    key_mask,
    line_output,
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
    """Compute z + TriangleAttention(z) on tiles; in place when gradients are off.

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
    parts = chosen(z, w)
    if name == "rows":
        return row_attention(z, mask, w, starting, layout, mesh, parts)
    if layout.size == 1:
        count = -(-z.shape[1] // lines_per_chunk(z, 1 if starting else 2, w, parts))
    else:
        made = sizes_on(layout, mesh, *sizes, w.q.shape[0], w.heads)
        count = chunks_taken(ATTENTION, name, layout, mesh, made, chunk_bytes(z.device))
        count = max(count, least_chunks(z, 1 if starting else 2, w, parts))
    moves = panel_attention(layout, starting, count, name.removeprefix("panel-"), mask is not None)
    return _panel_attention(z, key_mask(mask), w, starting, moves, layout, mesh, parts)


def _panel_attention(
    z: Tensor,
    keep: Tensor | None,
    w: TriangleAttentionWeights,
    starting: bool,
    chunks: Iterator[tuple[Span, Plan]],
    layout: PairLayout,
    mesh: Mesh,
    parts: Parts,
) -> Tensor:
    """Update the lines chunk by chunk, each with all panels of keys: the loop."""
    dim, own_panels = (1 if starting else 2), layout.panels_of(starting)

    def along(x: Tensor) -> Tensor:
        return x if starting else x.transpose(1, 2)

    def chunk_of(x: Tensor, span: Span) -> Tensor:
        return along(x.narrow(dim, span[0], span[1] - span[0]))

    # The bias lies as the lines read it: [B, H, T_r, panel], or for the ending node its transpose.
    bias = bias_panels(along(z), w, parts, own_panels)
    alone = layout.size == 1 and parts.cuequivariance and not torch.is_grad_enabled()
    if alone:
        cut = None if keep is None else along(keep)[:, :, : layout.n]
        whole, cut = prepare(bias[0][..., : layout.n], cut, compute_dtype(z))
        bias, keep = (whole,), None if cut is None else along(cut)

    def moves() -> Iterator[tuple[tuple[Span, list[Lines]], Plan, tuple[Tensor, ...]]]:
        for span, plan in chunks:
            held = [project_lines(chunk_of(z, span), w, parts, own_panels)]
            keys = () if keep is None else chunk_of(keep, span).chunk(own_panels, 2)
            yield (span, held), plan, (*held[0].kv, *bias, *(k.contiguous() for k in keys))

    # Boxes are (rows, columns) of the tile: for the ending node, rows are positions.
    keys, pairs = ((1, 2), (2, 3)) if starting else ((2, 1), (3, 2))
    kinds = ((keys, mesh.policy.wire), (pairs, "raw"), (keys, "raw"))[: 2 if keep is None else 3]
    dims: list[Dims] = [d for d, _ in kinds for _ in range(own_panels)]
    wires = [wire for _, wire in kinds for _ in range(own_panels)]
    real, last = key_panels(layout), last_key_step(layout)
    carry: Carry | None = None
    updated = []  # in place without gradients
    for (span, held), step, regions in chained(mesh, moves(), dims, LABEL, wires):
        if (count := real[step][1] - real[step][0]) > 0:  # padding alone adds nothing
            panel = _panel(regions, count, alone)
            carry = attend_lines(held[0], *panel, carry, step == last, parts)
        if step + 1 == layout.panels:
            assert carry is not None
            held.clear()  # the output and the next chunk do without its queries
            updated.append(along(line_output(chunk_of(z, span), carry, w, parts)))
            carry = None
    return torch.cat(updated, dim) if torch.is_grad_enabled() else z


def _panel(regions: Regions, count: int, prepared: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cut a panel to its real keys: k and v, bias, mask; the last two may be `prepared` so."""
    kv, bias, *keep = regions
    mask = keep[0] if keep else None
    if not prepared:
        bias, mask = bias[..., :count], None if mask is None else mask[:, :, :count]
    return kv[:, :, :count], bias, mask
