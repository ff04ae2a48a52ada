"""Say which keys of a line count, as Boltz weighs masked keys."""

from __future__ import annotations

import torch
from torch import Tensor

from foldcp_kernels.triangle_attention.definition import MASKED


def kept(keep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Find the keys of each line that count, and what the best of them loses.

    A key that loses more than the best of its panel has no weight beside it. The panel counts by
    what its best loses: not at all, unless that is so in every panel.

    Args:
        keep: mask of a panel's keys [B, I, K], bool or from 0 to 1.
        dtype: of the queries.

    Returns:
        Bool [B, I, K], with a key in each line; what a logit of these loses [B, I].
    """
    lost = MASKED * (1 - keep.to(torch.promote_types(dtype, torch.float32)))
    least = lost.amin(-1)
    return lost == least[..., None], least
