"""Conditioned LayerNorm and the gated residual, one pass over the activations each.

    out = LN(a) * f(scale) + shift
    out = a + f(gate) * x               f = sigmoid where the conditioning comes as logits

`scale`, `shift` and `gate` may be shared by the samples: programs of one block of tokens are
neighbours, so all but one of them read the conditioning from the L2 cache. Statistics and sums are
float32.

Source: AlphaFold 3 supplement, Algorithms 24 and 25 (gates) and 26.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foldcp_kernels.core.dispatch import compute_dtype
from foldcp_kernels.core.triton_configs import pick
from foldcp_kernels.core.triton_launch import capability, cdiv, launch, next_power_of_2


@triton.jit
def _load(p_x, s_x, i_m, o_n, o_c, m_x):
    p = p_x + i_m * s_x[0] + o_n[:, None] * s_x[1] + o_c[None, :] * s_x[2]
    return tl.load(p, mask=m_x, other=0.0).to(tl.float32)


@triton.jit
def _adaptive_norm_kernel(
    p_a, p_scale, p_shift, p_x, p_out, s_a, s_scale, s_shift, s_x, s_out, samples, tokens, eps,
    C: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    i_m = (tl.program_id(0) % samples).to(tl.int64)
    o_n = (tl.program_id(0) // samples).to(tl.int64) * BN + tl.arange(0, BN)
    o_c = tl.arange(0, BC)
    m_c = o_c < C
    m_x = (o_n < tokens)[:, None] & m_c[None, :]
    b_a = _load(p_a, s_a, i_m, o_n, o_c, m_x)  # [BN, BC]
    b_scale = _load(p_scale, s_scale, i_m, o_n, o_c, m_x)
    if SIGMOID:
        b_scale = tl.sigmoid(b_scale)
    if p_x is None:
        b_d = tl.where(m_c[None, :], b_a - (tl.sum(b_a, 1) / C)[:, None], 0.0)
        # The rounding of the mean would be all there is of a row that is nearly constant.
        b_d = tl.where(m_c[None, :], b_d - (tl.sum(b_d, 1) / C)[:, None], 0.0)
        b_rstd = tl.rsqrt(tl.sum(b_d * b_d, 1) / C + eps)
        b_shift = _load(p_shift, s_shift, i_m, o_n, o_c, m_x)
        b_y = b_d * b_rstd[:, None] * b_scale + b_shift
    else:
        b_y = b_a + b_scale * _load(p_x, s_x, i_m, o_n, o_c, m_x)
    p_y = p_out + i_m * s_out[0] + o_n[:, None] * s_out[1] + o_c[None, :] * s_out[2]
    tl.store(p_y, b_y.to(p_out.dtype.element_ty), mask=m_x)


def adaptive_norm_fwd(
    a: Tensor, scale: Tensor, shift: Tensor, out_dtype: torch.dtype, sigmoid: bool, eps: float
) -> Tensor:
    """Compute LN(a) * scale + shift.

    Args:
        a: [M, n, C], any strides.
        scale: [1 or M, n, C].
        shift: [1 or M, n, C].
        out_dtype: of the result.
        sigmoid: `scale` holds logits.
        eps: of the LayerNorm.

    Returns:
        [M, n, C] in `out_dtype`.

    Source: AlphaFold 3 supplement, Algorithm 26.
    """
    return _run(a, scale, shift, None, out_dtype, sigmoid, eps)


def adaptive_norm(a: Tensor, scale: Tensor, shift: Tensor, sigmoid: bool) -> Tensor:
    """See `adaptive_norm`: its forward."""
    return adaptive_norm_fwd(a, scale, shift, compute_dtype(a), sigmoid, 1e-5)


def gated_residual_fwd(a: Tensor, gate: Tensor, x: Tensor, sigmoid: bool) -> Tensor:
    """Compute a + gate * x.

    Args:
        a: [M, n, C], any strides.
        x: [M, n, C], any strides.
        gate: [1 or M, n, C].
        sigmoid: `gate` holds logits.

    Returns:
        [M, n, C] in the dtype of `a`.

    Source: AlphaFold 3 supplement, Algorithms 24 and 25.
    """
    return _run(a, gate, None, x, a.dtype, sigmoid, 0.0)


def _run(
    a: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    x: Tensor | None,
    dtype: torch.dtype,
    sigmoid: bool,
    eps: float,
) -> Tensor:
    m, n, c = a.shape
    out = torch.empty((m, n, c), dtype=dtype, device=a.device)
    # A dimension of size 1 is read for every sample.
    scale = scale.expand(m, n, c)
    shift = None if shift is None else shift.expand(m, n, c)
    bc = next_power_of_2(c)
    config = pick("adaptive_norm", 2, capability(a.device))
    bn = max(1, config.blocks["BE"] // bc)
    strides = (None if t is None else t.stride() for t in (a, scale, shift, x, out))
    launch(
        _adaptive_norm_kernel, (m * cdiv(n, bn),),
        a, scale, shift, x, out, *strides, m, n, eps,
        C=c, BC=bc, BN=bn, SIGMOID=sigmoid,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out


def flops(m: int, n: int, c: int) -> int:
    """Count the floating-point operations of the LayerNorm and what follows it.

    Args:
        m: samples.
        n: tokens.
        c: channels.
    """
    return 10 * m * n * c


def traffic(m: int, n: int, c: int, a_bytes: int, gate_bytes: int, out_bytes: int) -> int:
    """Count bytes read and written in device memory; all samples share one read of conditioning.

    Args:
        m: samples.
        n: tokens.
        c: channels.
        a_bytes: of an element of a.
        gate_bytes: of an element of the conditioning.
        out_bytes: of an element of the result.
    """
    return n * c * (m * (a_bytes + out_bytes) + 2 * gate_bytes)
