"""Masks of tokens and pairs, as the blocks of the trunk take them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from foldcp.fabric.mesh import Mesh
from foldcp.layout.tiles import PairLayout

Masks = tuple[Tensor, Tensor | None, Tensor | None]


def padding_mask(layout: PairLayout, device: torch.device) -> Tensor:
    """Return the mask of a tile [1, T_r, T_c]: 1 where both tokens are real, 0 on padding.

    Args:
        layout: the tiling.
        device: of the mask.
    """
    rows = torch.arange(*layout.row_span(), device=device) < layout.n
    cols = torch.arange(*layout.col_span(), device=device) < layout.n
    return (rows[:, None] & cols[None, :])[None].float()


def stack_masks(
    layout: PairLayout,
    mesh: Mesh,
    token_mask: Tensor | None = None,
    pair_mask: Tensor | None = None,
) -> Masks:
    """Turn the masks that stock's modules take into those that the blocks of a stack take.

    Args:
        layout: the tiling.
        mesh: the mesh.
        token_mask: [B, N] on every rank, 1 = keep, a row for each element of a batch; None keeps
            all tokens.
        pair_mask: tile [1 or B, T_r, T_c], 1 = keep; None keeps the pairs of kept tokens.

    Returns:
        (pairs that multiplications sum over [1 or B, T_r, T_c], 0 on padding; the same as keys of
        attention, None where no real token is masked; tokens of the columns [B, T_c] or None).

    Raises:
        ValueError: a mask that does not fit the layout.
    """
    real = padding_mask(layout, mesh.device)
    tokens = None
    if token_mask is not None:
        if token_mask.ndim != 2 or token_mask.shape[1] != layout.n:
            mesh.refuse(f"`token_mask` is {list(token_mask.shape)}; expected [B, {layout.n}]")
        padded = F.pad(token_mask, (0, layout.padded - layout.n))
        rows, tokens = (padded[:, slice(*span)] for span in layout.tile_box())
        if pair_mask is None:
            pair_mask = rows[:, :, None] * tokens[:, None]
    if pair_mask is None:
        return real, None, None
    mesh.check(pair_mask, layout, "pair_mask")
    if pair_mask.ndim != 3:
        mesh.refuse(f"`pair_mask` is {list(pair_mask.shape)}; expected [1 or B, T_r, T_c]")
    pairs = pair_mask * real.to(pair_mask.dtype)
    return pairs, pairs, tokens
