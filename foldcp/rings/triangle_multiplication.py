"""Triangle multiplication over panels of k: the loop.

Panels on a 2x3 mesh (L = 6; rank (r, c) uses panel (t + 2c + 3r) mod 6 at step t; the owner of
panel k of a row of tiles is the column k // 2, of a column of tiles the row k // 3):

    step   (0,0)  (0,1)  (0,2)  (1,0)  (1,1)  (1,2)
    0      0      2      4      3      5      1
    1      1      3      5      4      0      2

Channels are taken in groups and pieces; the first panels of the next group are under way while
the last ones of a group are used.
Backward: the gradients of the panels of a and b are added up at their owners.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from foldcp.fabric.exchange.pipeline import Regions, chained
from foldcp.fabric.mesh import Mesh
from foldcp.layout.cuts import strips_of_lines
from foldcp.layout.schedule import Plan
from foldcp.layout.strategies import panel_multiplication
from foldcp.layout.tiles import PairLayout
from foldcp.planner.choice import sizes_on, strategy
from foldcp.rings.channel_multiplication import LABEL, channel_products
from foldcp_kernels.core.chunking import chunk_bytes
from foldcp_kernels.core.dispatch import compute_dtype
from foldcp_kernels.core.recompute import nothing
from foldcp_kernels.triangle_multiplication import TriangleMultiplicationWeights
from foldcp_kernels.triangle_multiplication.contraction import accumulated, contract
from foldcp_kernels.triangle_multiplication.fp8 import Scaled
from foldcp_kernels.triangle_multiplication.parts import (
    Parts,
    chosen,
    gated_update,
    plane_panels,
    run_cuequivariance,
    scaled_planes,
)


def triangle_multiplication(
    z: Tensor,
    mask: Tensor | None,
    w: TriangleMultiplicationWeights,
    outgoing: bool,
    layout: PairLayout,
    mesh: Mesh,
) -> Tensor:
    """Compute z + TriangleMultiplication(z) on tiles; in place when gradients are off.

    Args:
        z: pair tile [B, T_r, T_c, C].
        mask: [B, T_r, T_c], 1 = keep; must be 0 on padding.
        w: weights.
        outgoing: Algorithm 12 (True) or 13 (False).
        layout: the tiling.
        mesh: the mesh.

    Returns:
        The updated tile [B, T_r, T_c, C].

    Raises:
        ValueError: `z` is not this rank's tile, or a shape or dtype does not fit it.

    Source: AlphaFold 3 supplement, Algorithms 12 and 13; Fold-CP (arXiv 2603.14806).
    """
    mesh.check(z, layout)
    mesh.fits("triangle_multiplication tile", z, mask, *vars(w).values())
    if not z.numel():
        return nothing(z, *vars(w).values())
    parts = chosen(z, w, mesh.policy.contraction)
    if layout.size == 1 and parts.cuequivariance:
        return run_cuequivariance(z, mask, w, outgoing)
    return gated_update(z, contraction(z, mask, w, outgoing, layout, mesh, parts), w, parts)


def contraction(
    z: Tensor,
    mask: Tensor | None,
    w: TriangleMultiplicationWeights,
    outgoing: bool,
    layout: PairLayout,
    mesh: Mesh,
    parts: Parts,
) -> Tensor:
    """Sum a b over all k, by the strategy that the planner chooses: [B, D, T_r, T_c].

    Args:
        z: pair tile [B, T_r, T_c, C].
        mask: [B, T_r, T_c], as in `triangle_multiplication`.
        w: weights.
        outgoing: Algorithm 12 (True) or 13 (False).
        layout: the tiling.
        mesh: the mesh.
        parts: what runs each part, from `foldcp_kernels.triangle_multiplication.parts.chosen`.
    """
    channels = w.p_in.shape[0] // 2
    sizes = z.element_size(), compute_dtype(z).itemsize
    name = strategy("triangle_multiplication", layout, mesh, *sizes, channels=channels)
    if name == "channel":
        return _joined(channel_products(z, mask, w, outgoing, layout, mesh, parts), channels)
    route = name.removeprefix("panel-")
    products = _panel_products(z, mask, w, outgoing, layout, mesh, parts, route)
    return _joined(products, channels)


def _joined(parts: Iterator[Tensor], channels: int) -> Tensor:
    """Chunks of channels [B, d, T_r, T_c] in one tensor."""
    if torch.is_grad_enabled():
        found = list(parts)
        return found[0] if len(found) == 1 else torch.cat(found, 1)
    whole: Tensor | None = None
    at = 0
    # Parts move into one tensor as they are done: joining them later would hold both.
    for part in parts:
        if whole is None:
            alone = part.shape[1] == channels
            whole = part if alone else part.new_empty((len(part), channels, *part.shape[2:]))
        if whole is not part:
            whole[:, at : at + part.shape[1]] = part
        at += part.shape[1]
        del part
    assert whole is not None
    return whole


def _panel_products(
    z: Tensor,
    mask: Tensor | None,
    w: TriangleMultiplicationWeights,
    outgoing: bool,
    layout: PairLayout,
    mesh: Mesh,
    parts: Parts,
    route: str,
) -> Iterator[Tensor]:
    """The contraction over all panels, in chunks of channels."""
    channels = w.p_in.shape[0] // 2
    sizes = sizes_on(layout, mesh, z.element_size(), compute_dtype(z).itemsize, channels)
    # With transposed planes the incoming update is the same product as the outgoing one: k is last
    # in memory, and each of its panels is contiguous.
    dims, own_panels = (1, 2, 3) if outgoing else (1, 3, 2), layout.panels_of(outgoing)
    strips = strips_of_lines(layout, outgoing)
    if not outgoing:
        z, mask = z.transpose(1, 2), None if mask is None else mask.transpose(1, 2)
    masks = (None,) * strips if mask is None else mask.chunk(strips, 1)
    largest = chunk_bytes(z.device)

    def moves() -> Iterator[tuple[None, Plan, tuple[Tensor, ...]]]:
        groups = panel_multiplication(layout, sizes, outgoing, route, largest)
        for group, plan in groups:
            planes: list[Tensor] = []
            for x, keep in zip(z.chunk(strips, 1), masks, strict=True):
                planes += plane_panels(x, keep, w, parts, group, own_panels)
            d = group[1] - group[0]
            yield None, plan, (*(p[:, :d] for p in planes), *(p[:, d:] for p in planes))
            del planes

    sources = 2 * strips * own_panels
    wire = "raw" if parts.fp8 else mesh.policy.wire  # FP8 planes travel as they are
    panels = chained(mesh, moves(), (dims,) * sources, LABEL, (wire,) * sources)
    acc: Tensor | None = None
    at = 0
    for _, step, regions in panels:
        to = at + regions[0].shape[1]
        acc = _added(acc, regions, layout, scaled_planes(z, w, parts, (at, to)))
        if (step + 1) % layout.panels == 0:
            out, acc, at = acc.to(compute_dtype(z)), None, to
            del regions  # the next planes do without these
            yield out
            del out


def _added(
    acc: Tensor | None, regions: Regions, layout: PairLayout, scaled: Scaled | None
) -> Tensor:
    """Add one panel's contribution [B, d, T_r, T_c], by strips of rows (a) and columns (b)."""
    height, at = 0, 0
    while height < layout.tile_rows:
        height, at = height + regions[at].shape[2], at + 1
    a, b = regions[:at], regions[at:]
    if len(a) == len(b) == 1:
        return contract(acc, a[0], b[0], True, layout.panels, scaled=scaled)
    if torch.is_grad_enabled():
        rows = [torch.cat([contract(None, x, y, True, layout.panels) for y in b], 3) for x in a]
        new = torch.cat(rows, 2)
        return new if acc is None else acc + new
    first = acc is None
    if acc is None:
        shape = (*a[0].shape[:2], layout.tile_rows, layout.tile_cols)
        dtype = a[0].dtype if scaled is None else scaled.dtype
        acc = a[0].new_empty(shape, dtype=accumulated(dtype, layout.panels))
    heights, widths = [x.shape[2] for x in a], [y.shape[2] for y in b]
    for x, part in zip(a, acc.split_with_sizes(heights, 2), strict=True):
        for y, to in zip(b, part.split_with_sizes(widths, 3), strict=True):
            contract(None if first else to, x, y, True, layout.panels, to, scaled)
    return acc
