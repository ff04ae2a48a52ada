"""Transition: z += (silu(LN(z) W1) * (LN(z) W2)) W3, the hidden layer only ever for a chunk.

Source: AlphaFold 3 supplement, Algorithm 11.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from foldcp_kernels.chunking import chunk_length, spans

EPS = 1e-5


@dataclass(frozen=True)
class TransitionWeights:
    """norm_weight, norm_bias [C]; fc1, fc2 [hidden, C]; fc3 [C_out, hidden]."""

    norm_weight: Tensor
    norm_bias: Tensor
    fc1: Tensor
    fc2: Tensor
    fc3: Tensor


def swiglu(x: Tensor, w: TransitionWeights) -> Tensor:
    """The transition of one chunk, residual not included: [..., C] -> [..., C_out]."""
    x = F.layer_norm(x, x.shape[-1:], w.norm_weight, w.norm_bias, EPS)
    return F.linear(F.silu(F.linear(x, w.fc1)) * F.linear(x, w.fc2), w.fc3)


def transition_chunks(
    x: Tensor, w: TransitionWeights, dim: int = 1
) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """The transition of `x`, chunk by chunk along `dim`.

    Args:
        x: [..., C]. w: weights. dim: the chunked dimension.

    Yields:
        ((start, stop), update of that chunk).
    """
    total = x.shape[dim]
    hidden = w.fc1.shape[0]
    each = x.numel() // max(1, total * x.shape[-1]) * hidden * x.element_size() * 2
    for lo, hi in spans(total, chunk_length(total, each, x.device)):
        yield (lo, hi), swiglu(x.narrow(dim, lo, hi - lo), w)
