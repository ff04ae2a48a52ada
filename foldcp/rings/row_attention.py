"""Triangle attention over whole lines: the group of a line's owners shares the lines out.

Lines (rows for the starting node, columns for the ending node) are taken in a few chunks. The ranks
that own the parts of a line (a mesh row, or a mesh column) each collect whole lines of their share
of the chunk, attend there while the bias of all queries comes in panels of keys, and send the
update back to the tiles. On a 2x3 mesh (L = 6), starting node, chunk of 3 lines of each tile; rank
(r, c) uses the bias panel (t + 2c + 3r) mod 6, which both ranks of mesh column panel // 2 own:

    rank     line   parts of it from         bias, step 0 / 1   update back to
    (0, 0)   0      self, (0,1), (0,2)       panel 0 / 1        self, (0,1), (0,2)
    (0, 1)   1      (0,0), self, (0,2)       panel 2 / 3        (0,0), self, (0,2)
    (0, 2)   2      (0,0), (0,1), self       panel 4 / 5        (0,0), (0,1), self
    (1, 0)   T_r    self, (1,1), (1,2)       panel 3 / 4        self, (1,1), (1,2)

Backward: gradients of updates and lines go the same ways in reverse; those of the bias are added up
at its owners.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from foldcp.cost import ATTENTION, Sizes, chunks_taken
from foldcp.layout import PairLayout
from foldcp.mesh import Mesh
from foldcp.plans import (
    key_panels,
    line_chunks,
    rows_back_plan,
    rows_bias_plan,
    rows_plan,
)
from foldcp.rings.pipeline import Move, Regions, ahead, behind, chained
from foldcp_kernels.carry import Carry
from foldcp_kernels.chunking import add_chunks, chunk_bytes
from foldcp_kernels.dispatch import compute_dtype
from foldcp_kernels.triangle_attention import (
    TriangleAttentionWeights,
    attend_lines,
    kept,
    least_chunks,
    line_output,
    project_bias,
    project_lines,
)

LABEL = "triangle_attention"


def row_attention(
    z: Tensor,
    mask: Tensor | None,
    w: TriangleAttentionWeights,
    starting: bool,
    layout: PairLayout,
    mesh: Mesh,
) -> Tensor:
    """z + TriangleAttention(z) on tiles; in place when gradients are off.

    Args:
        z, mask, w, starting, layout, mesh: see `triangle_attention`.

    Returns:
        The updated tile [B, T_r, T_c, C].

    Source: foldcp design, section 6.
    """
    dim = 1 if starting else 2
    keep = kept(mask)
    # The bias lies as the lines read it: [B, H, T_r, T_c], or for the ending node its transpose.
    bias = project_bias(z if starting else z.transpose(1, 2), w)
    sizes = Sizes(z.element_size(), compute_dtype(z).itemsize, w.q.shape[0], w.heads, mesh.wire)
    count = chunks_taken(ATTENTION, "rows", layout, mesh, sizes, chunk_bytes(z.device))
    chunks = line_chunks(layout, starting, max(count, least_chunks(z, dim, w)))

    def lines() -> Iterator[Move]:
        for lo, hi in chunks:
            sources = tuple(x.narrow(dim, lo, hi - lo) for x in (z, keep) if x is not None)
            yield rows_plan(layout, starting, (lo, hi), len(sources)), sources

    def updates() -> Iterator[Move]:
        count = 1 if keep is None else 2
        wires = (mesh.wire, "raw")[:count]
        whole = ahead(mesh, lines(), ((1, 2),) * count, LABEL, wires)
        # Boxes are (rows, columns) of the tile: for the ending node, rows are keys. The first panel
        # of the next chunk is asked for before the lines of the one after it.
        again = iter([(rows_bias_plan(layout, starting), (bias,))] * len(chunks))
        panels = chained(mesh, again, ((2, 3) if starting else (3, 2),), LABEL, ("raw",))
        for chunk in chunks:
            x, *keys = next(whole)
            if not starting:
                x, keys = x.transpose(1, 2), [k.transpose(1, 2) for k in keys]
            update = _attended(x, keys[0] if keys else None, panels, w, layout)
            del x, keys
            update = update if starting else update.transpose(1, 2)
            yield rows_back_plan(layout, starting, chunk), (update,)
            del update
        assert next(panels, None) is None  # the last exchange ends

    back = behind(mesh, updates(), ((1, 2),), LABEL, (mesh.wire,))
    return add_chunks(z, dim, ((chunk, update) for chunk in chunks for (update,) in [next(back)]))


def _attended(
    x: Tensor,
    keep: Tensor | None,
    panels: Iterator[Regions],
    w: TriangleAttentionWeights,
    layout: PairLayout,
) -> Tensor:
    """The update of whole lines [B, lines, N, C]; keep [B, lines, N] says which keys count."""
    mine = project_lines(x, w)
    spans = key_panels(layout)
    last = max(t for t, (lo, hi) in enumerate(spans) if lo < hi)
    carry: Carry | None = None
    for step, (lo, hi) in enumerate(spans):
        (b,) = next(panels)
        if lo == hi:
            continue
        kv, b = mine.kv[:, :, lo:hi], b[..., : hi - lo]
        keys = None if keep is None else keep[:, :, lo:hi]
        carry = attend_lines(mine, kv, b, keys, carry, step == last)
    assert carry is not None
    del mine, kv
    return line_output(x, carry, w, residual=False)
