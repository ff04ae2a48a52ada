"""Run NVIDIA's cuEquivariance as an optional implementation of triangle multiplication."""

from __future__ import annotations

import torch
from torch import Tensor

from foldcp_kernels.core.dispatch import compute_dtype
from foldcp_kernels.triangle_attention.cuequivariance import package
from foldcp_kernels.triangle_multiplication.definition import TriangleMultiplicationWeights


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
