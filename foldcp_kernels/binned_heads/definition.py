"""Define expectations over bins in plain torch: the truth, run it in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def expected_values(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
    other: Tensor | None = None,
    weight_other: Tensor | None = None,
    same: Tensor | None = None,
) -> Tensor:
    """Compute expectations of several values per bin under softmax(W (x + other)).

    Args:
        x: [..., C].
        weight: [bins, C].
        values: [K, bins].
        bias: [bins] or None.
        other: [..., C], added to x; None for none.
        weight_other: [bins, C], for pairs where `same` is False; None for `weight` everywhere.
        same: bool [...], pairs that take `weight`.

    Returns:
        The expectations [K, ...].

    Source: AlphaFold 3, section 4.3.
    """
    x = x if other is None else x + other
    logits = F.linear(x, weight, bias)
    if weight_other is not None:
        logits = torch.where(same[..., None], logits, F.linear(x, weight_other, bias))
    return torch.einsum("...b,kb->k...", logits.softmax(-1), values.to(logits.dtype))
