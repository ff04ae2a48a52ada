"""Triangle multiplication over panels of k: the loop.

Panels on a 2x3 mesh (L = 6; rank (r, c) uses panel (t + 2c + 3r) mod 6 at step t; the owner of
panel k of a row of tiles is the column k // 2, of a column of tiles the row k // 3):

    step   (0,0)  (0,1)  (0,2)  (1,0)  (1,1)  (1,2)
    0      0      2      4      3      5      1
    1      1      3      5      4      0      2

Backward: the gradients of the panels of a and b are added up at their owners.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foldcp.exchange import stream
from foldcp.layout import PairLayout, Span
from foldcp.mesh import Mesh
from foldcp.plans import chunks, triangle_multiplication_plan
from foldcp_kernels import triangle_multiplication as op
from foldcp_kernels.dispatch import default_impl
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
    """sum_k a b over all panels, group of channels by group of channels: [B, D, T_r, T_c]."""
    channels = w.p_in.shape[0] // 2
    plane_bytes = z.element_size() * layout.tile_rows * layout.tile_cols
    groups = channel_groups(layout, channels, plane_bytes)
    if layout.size == 1 and not outgoing:
        # Alone, transposed planes make the incoming update the same product as the outgoing one.
        z, mask, outgoing = z.transpose(1, 2), None if mask is None else mask.transpose(1, 2), True
    whole: Tensor | None = None
    parts: list[Tensor] = []
    at = 0
    for group in groups:
        pieces = contract_group(project_planes(z, mask, w, group), outgoing, layout, mesh)
        if torch.is_grad_enabled() or len(groups) == len(pieces) == 1:
            parts += pieces
            continue
        # Pieces move into one tensor as they are done: joining them later would hold both.
        for piece in pieces:
            if whole is None:
                whole = piece.new_empty((piece.shape[0], channels, *piece.shape[2:]))
            whole[:, at : at + piece.shape[1]] = piece
            at += piece.shape[1]
        del pieces, piece
    if whole is not None:
        return whole
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def contract_group(planes: Tensor, outgoing: bool, layout: PairLayout, mesh: Mesh) -> list[Tensor]:
    """The contraction of one group of channels [B, 2d, T_r, T_c], in channel pieces."""
    d = planes.shape[1] // 2
    plane_bytes = planes.element_size() * layout.tile_rows * layout.tile_cols
    pieces = channel_pieces(layout, d, plane_bytes)
    plan = triangle_multiplication_plan(layout, d, outgoing, pieces, mesh.route)
    sources, dims = (planes[:, :d], planes[:, d:]), ((1, 2, 3),) * 2
    out: list[Tensor] = []
    acc: Tensor | None = None
    for step, (a, b) in enumerate(stream(mesh, plan, sources, dims, "triangle_multiplication")):
        acc = contract(acc, a, b, outgoing, layout.panels)
        if (step + 1) % layout.panels == 0:
            out.append(acc.to(planes.dtype))
            acc = None
    return out
