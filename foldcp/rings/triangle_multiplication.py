"""Triangle multiplication over panels of k: the loop.

Panels on a 2x3 mesh (L = 6; rank (r, c) uses panel (t + 2c + 3r) mod 6 at step t; the owner of
panel k of a row of tiles is the column k // 2, of a column of tiles the row k // 3):

    step   (0,0)  (0,1)  (0,2)  (1,0)  (1,1)  (1,2)
    0      0      2      4      3      5      1
    1      1      3      5      4      0      2

Backward: the gradients of the panels of a and b are added up at their owners.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from foldcp.cost import strategy
from foldcp.exchange import stream
from foldcp.layout import PairLayout, Span
from foldcp.mesh import Mesh
from foldcp.plans import chunks, triangle_multiplication_plan
from foldcp.rings.channel_multiplication import channel_products
from foldcp_kernels import triangle_multiplication as op
from foldcp_kernels.dispatch import compute_dtype, default_impl
from foldcp_kernels.triangle_multiplication import (
    TriangleMultiplicationWeights,
    contract,
    gated_update,
    project_planes,
)

_PANEL_BYTES = 1 << 20  # below this, latency costs more than the memory is worth
_MOST_PIECES = 8


def channel_groups(layout: PairLayout, channels: int, plane_bytes: int) -> list[Span]:
    """Channels whose planes exist at the same time; a mesh keeps a quarter to make room for panels.

    Args:
        layout: the tiling. channels: D. plane_bytes: bytes of one channel of a tile.
    """
    many = layout.size > 1 and channels * plane_bytes >= 4 * _PANEL_BYTES
    return list(chunks(channels, 4 if many else 1))


def channel_pieces(layout: PairLayout, channels: int, plane_bytes: int) -> int:
    """Channel chunks of one group's exchange: received panels stay small beside the tile."""
    if layout.size == 1:
        return 1
    panel = channels * plane_bytes * max(layout.mesh_rows, layout.mesh_cols) // layout.panels
    return max(1, min(channels, _MOST_PIECES, panel // _PANEL_BYTES))


def triangle_multiplication(
    z: Tensor,
    mask: Tensor | None,
    w: TriangleMultiplicationWeights,
    outgoing: bool,
    layout: PairLayout,
    mesh: Mesh,
) -> Tensor:
    """z + TriangleMultiplication(z) on tiles; in place when gradients are off.

    Args:
        z: pair tile [B, T_r, T_c, C]. mask: [B, T_r, T_c], 1 = keep; must be 0 on padding.
        w: weights. outgoing: Algorithm 12 (True) or 13 (False).
        layout: the tiling. mesh: the mesh.

    Returns:
        The updated tile [B, T_r, T_c, C].

    Raises:
        ValueError: `z` is not this rank's tile.

    Source: AlphaFold 3 supplement, Algorithms 12 and 13; Fold-CP (arXiv 2603.14806).
    """
    layout.check(z)
    if layout.size == 1 and default_impl() == "cuequivariance":
        return op.triangle_multiplication(z, mask, w, outgoing, "cuequivariance")
    return gated_update(z, contraction(z, mask, w, outgoing, layout, mesh), w)


def contraction(
    z: Tensor,
    mask: Tensor | None,
    w: TriangleMultiplicationWeights,
    outgoing: bool,
    layout: PairLayout,
    mesh: Mesh,
) -> Tensor:
    """sum_k a b over all k, by the strategy that `foldcp.cost` names: [B, D, T_r, T_c]."""
    channels = w.p_in.shape[0] // 2
    sizes = z.element_size(), compute_dtype(z).itemsize
    name = strategy("triangle_multiplication", layout, mesh, *sizes, channels=channels)
    if name == "channel":
        return _joined(channel_products(z, mask, w, outgoing, layout, mesh), channels)
    route = name.removeprefix("panel-")
    return _joined(_panel_products(z, mask, w, outgoing, layout, mesh, route), channels)


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
    route: str,
) -> Iterator[Tensor]:
    """The contraction over all panels, in chunks of channels."""
    channels = w.p_in.shape[0] // 2
    plane_bytes = z.element_size() * layout.tile_rows * layout.tile_cols
    if layout.size == 1 and not outgoing:
        # Alone, transposed planes make the incoming update the same product as the outgoing one.
        z, mask, outgoing = z.transpose(1, 2), None if mask is None else mask.transpose(1, 2), True
    for group in channel_groups(layout, channels, plane_bytes):
        planes = project_planes(z, mask, w, group)
        yield from _group_products(planes, outgoing, layout, mesh, route)
        del planes


def _group_products(
    planes: Tensor, outgoing: bool, layout: PairLayout, mesh: Mesh, route: str
) -> Iterator[Tensor]:
    """The contraction of one group of channels [B, 2d, T_r, T_c], in channel pieces."""
    d = planes.shape[1] // 2
    plane_bytes = planes.element_size() * layout.tile_rows * layout.tile_cols
    pieces = channel_pieces(layout, d, plane_bytes)
    plan = triangle_multiplication_plan(layout, d, outgoing, pieces, route)
    sources, dims, wires = (planes[:, :d], planes[:, d:]), ((1, 2, 3),) * 2, (mesh.wire,) * 2
    acc: Tensor | None = None
    panels = stream(mesh, plan, sources, dims, "triangle_multiplication", wires)
    for step, (a, b) in enumerate(panels):
        acc = contract(acc, a, b, outgoing, layout.panels)
        if (step + 1) % layout.panels == 0:
            out, acc = acc.to(planes.dtype), None
            yield out
            del out
