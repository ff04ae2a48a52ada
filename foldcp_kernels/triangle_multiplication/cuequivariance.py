"""Run NVIDIA's cuEquivariance as an optional implementation of triangle multiplication.

It is handed z and the weights as they are: it rounds what it multiplies as autocast says, after
LayerNorm. In z itself the rounding would grow with the mean of the channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foldcp_kernels.core.trial.cuequivariance import package
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
        ValueError: the package cannot run.
    """
    update = package().triangle_multiplicative_update(
        z,
        direction="outgoing" if outgoing else "incoming",
        mask=None if mask is None else mask.to(z.dtype),
        norm_in_weight=w.norm_in_weight,
        norm_in_bias=w.norm_in_bias,
        p_in_weight=w.p_in,
        g_in_weight=w.g_in,
        norm_out_weight=w.norm_out_weight,
        norm_out_bias=w.norm_out_bias,
        p_out_weight=w.p_out,
        g_out_weight=w.g_out,
        eps=1e-5,
    )
    return z + update if torch.is_grad_enabled() else z.add_(update)
