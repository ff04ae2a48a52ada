"""Expectations of binned predictions: pairs in, one number per value column out.

    out_k = sum_b softmax(W (x + other) + bias)_b values_kb

Logits exist for one chunk of rows only, in the fused kernel for one block of pairs.

Source: AlphaFold 3 supplement, sections 4.3 (PAE, PDE, pLDDT), 4.4 (distogram) and 5.9.1 (pTM).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foldcp_kernels.binned_heads import definition
from foldcp_kernels.core.arguments import check
from foldcp_kernels.core.chunking import chunk_bytes, spans
from foldcp_kernels.core.dispatch import check_dtype
from foldcp_kernels.core.op import Op
from foldcp_kernels.core.recompute import recompute

MAX_BINS = 128
MAX_VALUES = 4


def bin_centres(bins: int, end: float, device: torch.device) -> Tensor:
    """Return the centres of `bins` equal bins between 0 and `end`, [bins].

    Args:
        bins: their number.
        end: upper end of the last one, angstrom.
        device: of the result.

    Source: AlphaFold 3 supplement, section 4.3.
    """
    width = end / bins
    return torch.arange(0.5 * width, end, width, device=device)


def tm_values(centres: Tensor, tokens: Tensor) -> Tensor:
    """Compute the TM score of an error at each bin centre, 1 / (1 + (d / d0(N))^2), [bins].

    Args:
        centres: bin centres in angstrom [bins].
        tokens: number of real tokens N, 0-dim.

    Source: AlphaFold 3 supplement, section 5.9.1 (N clipped to at least 19).
    """
    d0 = 1.24 * (tokens.clip(min=19) - 15) ** (1 / 3) - 1.8
    return 1 / (1 + (centres / d0) ** 2)


def expectations(logits: Tensor, values: Tensor) -> Tensor:
    """Compute expectations of several values per bin under softmax(logits), without gradient.

    Args:
        logits: [..., bins].
        values: [K, bins], float32 or float64; the softmax has their dtype.

    Returns:
        [K, ...] in the dtype of `values`.

    Raises:
        ValueError: the numbers of bins differ, or a dtype is no float.

    Source: AlphaFold 3 supplement, section 4.3.
    """
    check("expectations", logits, values)
    with torch.no_grad():
        return _expect(logits, values)


def expected_values(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
    other: Tensor | None = None,
    weight_other: Tensor | None = None,
    same: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Compute expectations of several values per bin under softmax(W (x + other) + bias).

    Args:
        x: [R, T, C] or [B, R, T, C], any strides.
        weight: [bins, C].
        values: [K, bins], float32 or float64; the softmax has their dtype.
        bias: [bins].
        other: added to `x`, same shape, any strides: the mirrored pairs of a symmetric head.
        weight_other: [bins, C], instead of `weight` for the pairs where `same` is False.
        same: bool, the shape of `x` without C; with `weight_other`, and only then.
        impl: see `foldcp_kernels.core.dispatch`.

    Returns:
        [K, R, T] or [K, B, R, T] in the dtype of `values`.

    Raises:
        ValueError: a shape or dtype that does not fit, or a named `impl` cannot run.

    Source: AlphaFold 3 supplement, sections 4.3 and 4.4.
    """
    return _EXPECTED(x, weight, values, bias, other, weight_other, same, impl=impl)


def _in_chunks(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    weight_other: Tensor | None,
    same: Tensor | None,
) -> Tensor:
    """The torch implementation; under autograd each chunk's logits are computed again."""
    if x.dim() == 4:
        parts = [
            _in_chunks(
                x[i], weight, values, bias, None if other is None else other[i], weight_other,
                None if same is None else same[i],
            )
            for i in range(len(x))
        ]  # fmt: skip
        return parts[0][:, None] if len(parts) == 1 else torch.stack(parts, 1)
    rows, cols, c = x.shape
    logits = len(weight) * (2 if weight_other is None else 4)
    each = cols * (c + logits) * max(x.element_size(), values.element_size())
    parts = []
    # Callers that stream pass chunks already, which smaller ones would only slow down.
    for lo, hi in spans(rows, max(1, chunk_bytes(x.device) // max(1, each))):
        cut, part = (None if t is None else t[lo:hi] for t in (other, same))
        given = x[lo:hi], weight, values, bias, cut, weight_other, part
        parts.append(recompute(_chunk, _chunk, *given))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _chunk(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    weight_other: Tensor | None,
    same: Tensor | None,
) -> Tensor:
    if other is not None:
        x = x + other
    if weight_other is None:
        return _expect(F.linear(x, weight, bias), values)
    assert same is not None
    both = F.linear(x, torch.cat([weight, weight_other]))
    logits = torch.where(same[..., None], *both.split(len(weight), -1))
    return _expect(logits if bias is None else logits + bias, values)


def _expect(logits: Tensor, values: Tensor) -> Tensor:
    with torch.autocast(logits.device.type, enabled=False):
        p = torch.softmax(logits, -1, dtype=values.dtype)
        return (values @ p.flatten(0, -2).T).unflatten(1, logits.shape[:-1])


def _refusal(
    x: Tensor, weight: Tensor, values: Tensor, bias: Tensor | None, other: Tensor | None, *_: Any
) -> str | None:
    if values.shape[1] > MAX_BINS or values.shape[0] > MAX_VALUES:
        return f"`values` is {list(values.shape)}; expected at most [{MAX_VALUES}, {MAX_BINS}]"
    if values.dtype != torch.float32:
        return f"`values` has dtype {values.dtype}; expected float32"
    named = ((x, "x"), (weight, "weight"), (x if other is None else other, "other"))
    return next((r for t, name in named if (r := check_dtype(t, name))), None)


def _fused() -> Callable[..., Tensor]:
    from foldcp_kernels.binned_heads.fused import expected_values

    return expected_values


_EXPECTED = Op(
    "expected_values",
    eager=_in_chunks,
    triton=_fused,
    covers=_refusal,
    definition=lambda x, weight, values, *more: definition.expected_values(
        x, weight, values, *more
    ).to(values.dtype),
    empty=lambda x, weight, values, *_: values.new_empty((len(values), *x.shape[:-1])),
    variants=(3, 4),
)
