"""Run NVIDIA's cuEquivariance as an optional implementation of triangle attention.

Its kernels need a CUDA device; nothing here is imported unless it is asked for.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor


def package() -> ModuleType:
    """Import the package `cuequivariance_torch`.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import cuequivariance_torch
    except ImportError as error:
        raise ValueError(
            "impl='cuequivariance' cannot run: the package cuequivariance_torch is not installed: "
            "pip install cuequivariance-torch cuequivariance-ops-torch-cu13"
        ) from error
    return cuequivariance_torch


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, keep: Tensor | None
) -> Tensor:
    """Compute the core of triangle attention.

    Args:
        q: [B, N, H, I, D].
        k: [B, N, H, K, D].
        v: [B, N, H, K, D].
        bias: [B, 1, H, I, K].
        scale: on q . k.
        keep: keys, bool [B, N, K], True = keep, or None.

    Returns:
        [B, N, H, I, D].

    Raises:
        ValueError: the package is not installed.
    """
    mask = None if keep is None else keep[:, :, None, None]
    # Its kernels read the bias in float32, except on Blackwell.
    q, k, v, bias = (x.contiguous() for x in (q, k, v, bias))
    return package().triangle_attention(q, k, v, bias, mask=mask, scale=scale)
