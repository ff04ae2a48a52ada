"""NVIDIA's cuEquivariance as an optional implementation of the two triangle ops.

Its kernels need a CUDA device; nothing here is imported unless it is asked for.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from foldcp_kernels.core.dispatch import compute_dtype
from foldcp_kernels.triangle_multiplication.definition import TriangleMultiplicationWeights


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


def triangle_multiplication(
    z: Tensor, mask: Tensor | None, w: TriangleMultiplicationWeights, outgoing: bool
) -> Tensor:
    """Compute z + triangle multiplication of z; in place when gradients are off.

    Args:
        z: [B, N, N, C].
        mask: [B, N, N], 1 = keep, or None.
        w: weights.
        outgoing: which of the two.

    Returns:
        [B, N, N, C].

    Raises:
        ValueError: the package is not installed.
    """
    dtype = compute_dtype(z)
    x = z.to(dtype)
    update = package().triangle_multiplicative_update(
        x,
        direction="outgoing" if outgoing else "incoming",
        mask=x.new_ones(x.shape[:3]) if mask is None else mask.to(dtype),
        norm_in_weight=w.norm_in_weight.to(dtype),
        norm_in_bias=w.norm_in_bias.to(dtype),
        p_in_weight=w.p_in.to(dtype),
        g_in_weight=w.g_in.to(dtype),
        norm_out_weight=w.norm_out_weight.to(dtype),
        norm_out_bias=w.norm_out_bias.to(dtype),
        p_out_weight=w.p_out.to(dtype),
        g_out_weight=w.g_out.to(dtype),
        eps=1e-5,
    )
    return z + update if torch.is_grad_enabled() else z.add_(update)
