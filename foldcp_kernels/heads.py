"""Expectations of binned predictions: logits in, one number per value column out.

    out_k = sum_b softmax(logits)_b values_kb

Logits exist for one row chunk only. Source: AlphaFold 3 supplement,
section 4.3 (PAE, PDE, pLDDT) and 5.9.1 (pTM).
"""

from __future__ import annotations

import torch
from torch import Tensor


def bin_centres(bins: int, end: float, device: torch.device) -> Tensor:
    """Centres of `bins` equal bins between 0 and `end`, [bins].

    Source: AlphaFold 3 supplement, section 4.3.
    """
    width = end / bins
    return torch.arange(0.5 * width, end, width, device=device)


def tm_values(centres: Tensor, tokens: Tensor) -> Tensor:
    """The TM score of an error at each bin centre, 1 / (1 + (d / d0(N))^2), [bins].

    Args:
        centres: bin centres in angstrom [bins]. tokens: number of real tokens N, 0-dim.

    Source: AlphaFold 3 supplement, section 5.9.1 (N clipped to at least 19).
    """
    d0 = 1.24 * (tokens.clip(min=19) - 15) ** (1 / 3) - 1.8
    return 1 / (1 + (centres / d0) ** 2)


def expectations(logits: Tensor, values: Tensor) -> Tensor:
    """Expectations under softmax(logits) of several values per bin, without gradient.

    Args:
        logits: [..., bins]. values: [K, bins], float32 or float64; the softmax has their dtype.

    Returns:
        [K, ...] in the dtype of `values`.

    Raises:
        ValueError: the numbers of bins differ.

    Source: AlphaFold 3 supplement, section 4.3.
    """
    if logits.shape[-1] != values.shape[-1]:
        raise ValueError(
            f"`values` has {values.shape[-1]} bins; expected {logits.shape[-1]} as in `logits`: "
            "compute the bin centres from the head's own number of bins"
        )
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        p = torch.softmax(logits, -1, dtype=values.dtype)
        return (values @ p.flatten(0, -2).T).unflatten(1, logits.shape[:-1])
