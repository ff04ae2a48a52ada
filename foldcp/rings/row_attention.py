"""Triangle attention over whole lines: the group of a line's owners shares the lines out.

Lines (rows for the starting node, columns for the ending node) are taken in a few chunks. The ranks
that own the parts of a line (a mesh row, or a mesh column) each collect whole lines of their share
of the chunk, normed and in the compute dtype, attend there while the bias of all queries comes in
panels of keys, and send the result back to the tiles, which gate, project and add it. On a 2x3 mesh
(L = 6), starting node, chunk of 3 lines of each tile; rank (r, c) uses the bias panel
(t + 2c + 3r) mod 6, which both ranks of mesh column panel // 2 own:

    rank     line   parts of it from         bias, step 0 / 1   result back to
    (0, 0)   0      self, (0,1), (0,2)       panel 0 / 1        self, (0,1), (0,2)
    (0, 1)   1      (0,0), self, (0,2)       panel 2 / 3        (0,0), self, (0,2)
    (0, 2)   2      (0,0), (0,1), self       panel 4 / 5        (0,0), (0,1), self
    (1, 0)   T_r    self, (1,1), (1,2)       panel 3 / 4        self, (1,1), (1,2)

A line stays in the parts that its owners hold: the queries of a part share a bias as a sample does,
all parts share the keys, and what travels of a part is contiguous on both ways.

Backward: gradients of results and lines go the same ways in reverse; those of the bias are added up
at its owners.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from foldcp.fabric.exchange.pipeline import Move, Regions, ahead, behind, chained
from foldcp.fabric.mesh import Mesh
from foldcp.fabric.transport.wire import FP8_THERE
from foldcp.layout import strategies
from foldcp.layout.strategies import ATTENTION, ThereAndBack
from foldcp.layout.tiles import PairLayout, Span
from foldcp.layout.triangle_plans import key_panels, last_key_step
from foldcp.planner.choice import chunks_taken, sizes_on
from foldcp_kernels.attention.carry import Carry
from foldcp_kernels.core.chunking import chunk_bytes
from foldcp_kernels.core.dispatch import compute_dtype
from foldcp_kernels.triangle_attention import TriangleAttentionWeights
from foldcp_kernels.triangle_attention.choice import Parts, least_chunks
from foldcp_kernels.triangle_attention.parts import (
    attend_lines,
    attended,
    bias_panels,
    key_mask,
    norm_lines,
    project_normed,
    updated_lines,
)

LABEL = "triangle_attention"
_DIMS = (0, 2, 3)  # of [parts, B, lines, positions, ..]


def row_attention(
    z: Tensor,
    mask: Tensor | None,
    w: TriangleAttentionWeights,
    starting: bool,
    layout: PairLayout,
    mesh: Mesh,
    parts: Parts,
) -> Tensor:
    """Compute z + TriangleAttention(z) on tiles; in place when gradients are off.

    Args:
        z: pair tile [B, T_r, T_c, C].
        mask: [B, T_r, T_c], as in `triangle_attention`.
        w: weights.
        starting: Algorithm 14 (True) or 15 (False).
        layout: the tiling.
        mesh: the mesh.
        parts: what runs each part, from `foldcp_kernels.triangle_attention.choice.chosen`.

    Returns:
        The updated tile [B, T_r, T_c, C].

    Source: docs/design/strategies-and-cost.md.
    """
    dim, keep = (1 if starting else 2), key_mask(mask)

    def chunk_of(x: Tensor, span: Span) -> Tensor:
        return _along(x.narrow(dim, span[0], span[1] - span[0]), starting)

    # The bias lies as the lines read it: [B, H, T_r, panel], or for the ending node its transpose.
    bias = bias_panels(_along(z, starting), w, parts, layout.panels_of(starting))
    itemsizes = z.element_size(), compute_dtype(z).itemsize
    sizes = sizes_on(layout, mesh, *itemsizes, w.q.shape[0], w.heads)
    count = chunks_taken(ATTENTION, "rows", layout, mesh, sizes, chunk_bytes(z.device))
    count = max(count, least_chunks(z, dim, w, parts))
    of_bias, chunks = strategies.row_attention(layout, starting, count, keep is not None)

    def lines() -> Iterator[Move]:
        for chunk in chunks:
            normed = norm_lines(chunk_of(z, chunk.span), w, parts)
            keys = () if keep is None else (chunk_of(keep, chunk.span).contiguous(),)
            yield chunk.there, tuple(x[None] for x in (normed, *keys))
            del normed, keys

    # Boxes are (rows, columns) of the tile: for the ending node, rows are keys. The first panel of
    # the next chunk is asked for before the lines of the one after it.
    again = iter([(None, of_bias, bias)] * len(chunks))
    dims, wires = ((2, 3) if starting else (3, 2),) * len(bias), ("raw",) * len(bias)
    panels = chained(mesh, again, dims, LABEL, wires)
    results = _results(lines(), panels, w, chunks, layout, mesh, parts, keep is not None)
    back = behind(mesh, results, (_DIMS,), LABEL, (mesh.policy.wire,))
    updated = []  # in place without gradients
    for chunk in chunks:
        (o,) = next(back)
        new = updated_lines(chunk_of(z, chunk.span), o[0], w, parts)
        updated.append(_along(new, starting))
        del o
    assert next(back, None) is None
    return torch.cat(updated, dim) if torch.is_grad_enabled() else z


def _along(x: Tensor, starting: bool) -> Tensor:
    """Lines first, positions second."""
    return x if starting else x.transpose(1, 2)


def _results(
    lines: Iterator[Move],
    panels: Iterator[tuple[None, int, Regions]],
    w: TriangleAttentionWeights,
    chunks: list[ThereAndBack],
    layout: PairLayout,
    mesh: Mesh,
    parts: Parts,
    masked: bool,
) -> Iterator[Move]:
    """The moves of the results of all chunks, back to the tiles."""
    # The backward of LayerNorm takes most of the gradient of lines away, and no rounding.
    wire = FP8_THERE if mesh.policy.wire == "fp8" else mesh.policy.wire
    sources = 2 if masked else 1
    whole = ahead(mesh, lines, (_DIMS,) * sources, LABEL, (wire, "raw")[:sources])
    for chunk in chunks:
        x, *keys = next(whole)
        o = _attended(x, keys[0] if keys else None, panels, w, layout, parts)
        del x, keys
        yield chunk.back, (o,)
        del o
    assert next(panels, None) is None  # the last exchange ends


def _attended(
    x: Tensor,
    keep: Tensor | None,
    panels: Iterator[tuple[None, int, Regions]],
    w: TriangleAttentionWeights,
    layout: PairLayout,
    how: Parts,
) -> Tensor:
    """The result of whole lines in parts [parts, B, lines, T, C]: as x, with HD channels.

    Args:
        keep: [parts, B, lines, T], which keys count.
    """
    parts, samples, _, width, _ = x.shape
    mine = project_normed(x.flatten(0, 1), w, how)
    (kv,) = (t.unflatten(0, (parts, samples)) for t in mine.kv)
    real, last = key_panels(layout), last_key_step(layout)
    carry: Carry | None = None
    for _ in range(layout.panels):
        _, step, (bias,) = next(panels)
        part, lo = divmod(real[step][0], width)
        count = real[step][1] - real[step][0]
        if count == 0:
            continue  # padding alone adds nothing

        def of_all(t: Tensor, part: int = part, lo: int = lo, count: int = count) -> Tensor:
            own = t[part, :, :, lo : lo + count]
            return own.expand(parts, *(-1,) * own.ndim).flatten(0, 1)

        # Queries of a part have its share of the bias: [parts * B, H, T, K].
        b = bias[..., :count].unflatten(2, (parts, width)).permute(2, 0, 1, 3, 4).flatten(0, 1)
        keys = None if keep is None else of_all(keep)
        carry = attend_lines(mine, of_all(kv), b, keys, carry, step == last, how)
        del b, keys
    assert carry is not None
    del mine, kv
    out: Tensor = attended(carry).unflatten(0, (parts, samples))
    return out
