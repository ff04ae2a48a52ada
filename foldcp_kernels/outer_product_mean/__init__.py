"""Outer product mean of MSA projections, with its output projection and residual.

    z_ij += bias + (1 / max(1, n_ij)) sum_cd W[:, c, d] sum_s a_sic b_sjd,
    n_ij = sum_s mask_si mask_sj

Source: AlphaFold 3 supplement, Algorithm 9.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from foldcp_kernels.core.chunking import add_chunks, chunk_length, spans
from foldcp_kernels.core.dispatch import check_dtype, compute_dtype
from foldcp_kernels.core.op import Op
from foldcp_kernels.core.recompute import recompute
from foldcp_kernels.outer_product_mean import definition

MAX_WIDTH = 64
# The model behind `auto`, not measured: a byte from the L2 cache costs half of one from device
# memory, and 64 pairs of a program share the weight and, per sequence, 24 * 64 numbers of a and b.
_L2_COST = 0.5
_PAIRS = 64
_READ_AGAIN = 24
_OF_PROGRAM = 128  # channels of the result, beyond which the outer product is made again


def outer_product_mean(
    z: Tensor,
    a: Tensor,
    b: Tensor,
    count: Tensor,
    weight: Tensor,
    bias: Tensor,
    impl: str | None = None,
) -> Tensor:
    """Compute z + outer product mean.

    The fused kernel reads the weight and the projections again for every block of pairs, from the
    L2 cache. Chunks of cuBLAS products write and read the outer product in device memory, unless so
    few sequences are there that the weight is contracted first. `auto` compares `kernel_bytes` with
    `chunked_bytes` (modelled, not measured): with D=32 and C=128 the kernel runs from 43 to 149
    sequences. impl="triton" always runs it.

    Args:
        z: pair tile [B, R, T, C].
        a: masked left projection [B, S, R, D].
        b: right [B, S, T, D].
        count: n_ij, float32 or float64 [B, R, T].
        weight: [C, D * D].
        bias: [C].
        impl: see `foldcp_kernels.core.dispatch`.

    Returns:
        `z`, changed in place, when gradients are off; else a new tensor.

    Raises:
        ValueError: a shape or dtype that does not fit, or a named `impl` cannot run.

    Source: AlphaFold 3 supplement, Algorithm 9.
    """
    return _OUTER_PRODUCT_MEAN(z, a, b, count, weight, bias, impl=impl)


def _eager(z: Tensor, a: Tensor, b: Tensor, count: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return add_chunks(z, 1, outer_product_chunks(a, b, count, weight, bias, z))


def outer_product_chunks(
    a: Tensor, b: Tensor, count: Tensor, weight: Tensor, bias: Tensor, like: Tensor
) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Yield the outer product mean row chunk by row chunk; under autograd each is recomputed.

    Args:
        a: [B, S, T_r, D].
        b: [B, S, T_c, D].
        count: n_ij, [B, T_r, T_c].
        weight: [C, D * D].
        bias: [C].
        like: the pair tile (device and element size).

    Yields:
        ((start, stop), update [B, stop - start, T_c, C]).
    """
    _, s, rows, d = a.shape
    cols, channels = b.shape[2], weight.shape[0]
    few = _few(s, d, channels)
    each = cols * (channels * 3 if few else 2 * d * d + channels) * a.element_size()
    update = _few_sequences if few else _many_sequences
    for lo, hi in spans(rows, chunk_length(rows, a.shape[0] * each, a.device)):
        part = count[:, lo:hi, :, None]
        yield (lo, hi), recompute(update, update, a[:, :, lo:hi], b, part, weight, bias)


def _few(s: int, d: int, channels: int) -> bool:
    """Tell whether contracting a with the weight first takes fewer operations."""
    return s * d * channels < s * d * d + d * d * channels


def _few_sequences(a: Tensor, b: Tensor, count: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    w = weight.unflatten(1, (a.shape[3], -1))
    left = torch.einsum("bsic,ocd->bisdo", a, w).flatten(2, 3)  # [B, r, S*D, C]
    right = b.transpose(1, 2).flatten(2)[:, None]  # [B, 1, T_c, S*D]
    return _mean(right @ left, count, bias)


def _many_sequences(a: Tensor, b: Tensor, count: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows, d = a.shape[2:]
    left = a.permute(0, 2, 3, 1).flatten(1, 2)  # [B, r*D, S]
    right = b.flatten(2)  # [B, S, T_c*D]
    outer = (left @ right).unflatten(1, (rows, d)).unflatten(3, (b.shape[2], d))
    outer = outer.transpose(2, 3).flatten(3)  # [B, r, T_c, D*D]
    return _mean(outer @ weight.t().to(outer.dtype), count, bias)


def _mean(out: Tensor, count: Tensor, bias: Tensor) -> Tensor:
    return out / count.clamp(min=1).to(out.dtype) + bias.to(out.dtype)


def kernel_bytes(s: int, d: int, channels: int, element_bytes: int) -> float:
    """Model the bytes per pair that the fused kernel reads from the L2 cache.

    Args:
        s: sequences.
        d: channels of a and b.
        channels: C of the tile.
        element_bytes: of an element.
    """
    again = -(-channels // _OF_PROGRAM)
    return element_bytes * (d * d * channels / _PAIRS + _READ_AGAIN * s * again)


def chunked_bytes(s: int, d: int, channels: int, element_bytes: int) -> float:
    """Model the bytes per pair that chunks write and read beyond the tile.

    Args:
        s: sequences.
        d: channels of a and b.
        channels: C of the tile.
        element_bytes: of an element.
    """
    passes = 6 * channels  # the product, its mean and its bias, each written and read
    return element_bytes * (passes if _few(s, d, channels) else passes + 2 * d * d)


def _slower(z: Tensor, a: Tensor, *_: Tensor) -> str | None:
    return _slower_reason(a.shape[1], a.shape[3], z.shape[3], compute_dtype(a).itemsize)


def _slower_reason(s: int, d: int, channels: int, element_bytes: int) -> str | None:
    """Return the reason to prefer chunked GEMMs, or None if the fused kernel should be faster."""
    fused = _L2_COST * kernel_bytes(s, d, channels, element_bytes)
    if fused <= chunked_bytes(s, d, channels, element_bytes):
        return None
    return "chunked products move fewer bytes for this number of sequences"


def _refusal(
    z: Tensor, a: Tensor, b: Tensor, count: Tensor, weight: Tensor, bias: Tensor
) -> str | None:
    if a.shape[3] > MAX_WIDTH:
        return f"`a` has {a.shape[3]} channels; expected at most {MAX_WIDTH}"
    named = ((z, "z"), (a, "a"), (b, "b"), (weight, "weight"))
    return next((r for x, name in named if (r := check_dtype(x, name))), None)


def _fused() -> Callable[..., Tensor]:
    from foldcp_kernels.outer_product_mean.fused import outer_product_mean

    return outer_product_mean


_OUTER_PRODUCT_MEAN = Op(
    "outer_product_mean",
    eager=_eager,
    triton=_fused,
    covers=_refusal,
    prefers=_slower,
    definition=definition.outer_product_mean_tile,
    in_place=True,
)
