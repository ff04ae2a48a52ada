"""Define attention with a bias in plain torch: the truth, run it in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attend with a bias.

    Args:
        q: [G0, G1, H, I, D].
        k: [G0, G1, H, K, D].
        v: [G0, G1, H, K, D].
        bias: [G0, 1, H, I, K] or None.
        scale: factor on q . k.
        keep: bool [G0, G1, K], True = keep; None keeps all.

    Returns:
        The output [G0, G1, H, I, D] and the lse [G0, G1, H, I].
    """
    logits = torch.einsum("abhid,abhkd->abhik", q, k) * scale
    logits = logits if bias is None else logits + bias
    if keep is not None:
        logits = logits.masked_fill(~keep[:, :, None, None], -torch.inf)
    return torch.einsum("abhik,abhkd->abhid", logits.softmax(-1), v), logits.logsumexp(-1)


def attention_pair_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Attend with a pair bias.

    Args:
        q: [M, N, H, D].
        k: [M, N, H, D].
        v: [M, N, H, D].
        bias: [1 or M, H, N, N].
        scale: factor on q . k.

    Returns:
        The output [M, N, H, D].

    Source: AlphaFold 3, Algorithm 24.
    """
    logits = torch.einsum("mihd,mjhd->mhij", q, k) * scale + bias
    return torch.einsum("mhij,mjhd->mihd", logits.softmax(-1), v)
