"""Expectations of binned predictions of pairs, their logits only ever in registers.

    out_k = sum_b softmax(W (x + other) + bias)_b values_kb,   W picked by `same` for each pair

`other` is the mirrored chunk of symmetric heads, read through its strides. Matrix products take the
dtype of the weight and accumulate in float32; the softmax is float32.

Source: AlphaFold 3 supplement, sections 4.3 and 4.4.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foldcp_kernels.core.dispatch import compute_dtype
from foldcp_kernels.core.triton_configs import pick
from foldcp_kernels.core.triton_launch import capability, cdiv, launch, next_power_of_2, packed
from foldcp_kernels.core.weight_cache import cast
from foldcp_kernels.norm_linear.fused import exactness


@triton.jit
def _project(b_x, p_w, o_b, o_c, m_w, C: tl.constexpr, EXACT: tl.constexpr):
    b_w = tl.load(p_w + o_b[:, None] * C + o_c[None, :], mask=m_w, other=0.0)
    return tl.dot(b_x, tl.trans(b_w), input_precision=EXACT)  # [BP, BK] @ [BK, BB] -> [BP, BB]


@triton.jit
def _expected_values_kernel(
    p_x, p_other, p_w, p_w_other, p_bias, p_same, p_values, p_out,
    s_x, s_other, s_same, s_out, sizes,
    C: tl.constexpr, K: tl.constexpr, BINS: tl.constexpr, BB: tl.constexpr,
    EXACT: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    lines, positions = sizes
    blocks = tl.cdiv(positions, BP)
    o_p = ((tl.program_id(0) % blocks) * BP + tl.arange(0, BP)).to(tl.int64)
    i_l = (tl.program_id(0) // blocks).to(tl.int64)
    i_b, i_i = i_l // lines, i_l % lines
    m_p = o_p < positions
    o_b = tl.arange(0, BB)
    m_b = o_b < BINS
    p_rows = p_x + i_b * s_x[0] + i_i * s_x[1] + o_p * s_x[2]
    b_y = tl.zeros([BP, BB], tl.float32)
    b_z = tl.zeros([BP, BB], tl.float32)
    for lo in tl.range(0, C, BK):
        o_c = lo + tl.arange(0, BK)
        m_x = m_p[:, None] & (o_c < C)[None, :]
        m_w = m_b[:, None] & (o_c < C)[None, :]
        b_x = tl.load(p_rows[:, None] + o_c[None, :] * s_x[3], mask=m_x, other=0.0)
        if p_other is not None:
            p_o = p_other + i_b * s_other[0] + i_i * s_other[1] + o_p * s_other[2]
            b_o = tl.load(p_o[:, None] + o_c[None, :] * s_other[3], mask=m_x, other=0.0)
            b_x = b_x.to(tl.float32) + b_o.to(tl.float32)
        b_x = b_x.to(p_w.dtype.element_ty)
        b_y += _project(b_x, p_w, o_b, o_c, m_w, C, EXACT)
        if p_w_other is not None:
            b_z += _project(b_x, p_w_other, o_b, o_c, m_w, C, EXACT)
    if p_w_other is not None:
        p_s = p_same + i_b * s_same[0] + i_i * s_same[1] + o_p * s_same[2]
        b_same = tl.load(p_s, mask=m_p, other=0) != 0
        b_y = tl.where(b_same[:, None], b_y, b_z)
    if p_bias is not None:
        b_y += tl.load(p_bias + o_b, mask=m_b, other=0.0).to(tl.float32)[None, :]
    b_y = tl.where(m_b[None, :], b_y, -float("inf"))
    b_y = tl.exp(b_y - tl.max(b_y, 1)[:, None])
    b_sum = tl.sum(b_y, 1)
    p_y = p_out + i_b * s_out[1] + i_i * s_out[2] + o_p * s_out[3]
    for k in tl.static_range(K):
        b_v = tl.load(p_values + k * BINS + o_b, mask=m_b, other=0.0)
        tl.store(p_y + k * s_out[0], tl.sum(b_y * b_v[None, :], 1) / b_sum, mask=m_p)


def expected_values_fwd(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
    other: Tensor | None = None,
    weight_other: Tensor | None = None,
    same: Tensor | None = None,
) -> Tensor:
    """Compute expectations of K values under softmax(W (x + other) + bias).

    Args:
        x: [B, R, T, C], any strides.
        weight: [bins, C] in the compute dtype, contiguous.
        values: float32 [K, bins], contiguous.
        bias: [bins].
        other: like `x`, added to it.
        weight_other: like `weight`, for the pairs where `same` is False.
        same: bool [B, R, T], any strides; with `weight_other` only.

    Returns:
        [K, B, R, T] in float32.

    Source: AlphaFold 3 supplement, sections 4.3 and 4.4.
    """
    b, r, t, c = x.shape
    (bias,) = packed(bias)
    k, bins = values.shape
    out = torch.empty((k, b, r, t), dtype=torch.float32, device=x.device)
    # Twice the bins are twice the accumulators.
    name = "expected_values" if bins <= 64 else "expected_values_wide"
    config = pick(name, weight.element_size(), capability(x.device))
    strides = (None if s is None else s.stride() for s in (x, other, same))
    launch(
        _expected_values_kernel, (cdiv(t, config.blocks["BP"]) * r * b,),
        x, other, weight, weight_other, bias, same, values, out,
        *strides, out.stride(), (r, t),
        C=c, K=k, BINS=bins, BB=max(16, next_power_of_2(bins)),
        EXACT=exactness(weight.dtype), **config.options(),
    )  # fmt: skip
    return out


def expected_values(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    weight_other: Tensor | None,
    same: Tensor | None,
) -> Tensor:
    """See `expected_values`: its forward."""
    dtype = compute_dtype(x)
    w, w_other = cast(weight, dtype), None if weight_other is None else cast(weight_other, dtype)
    if x.dim() == 4:
        return expected_values_fwd(x, w, values.contiguous(), bias, other, w_other, same)
    other, same = (None if t is None else t[None] for t in (other, same))
    return expected_values_fwd(x[None], w, values.contiguous(), bias, other, w_other, same)[:, 0]


def flops(pairs: int, c: int, bins: int, k: int, weights: int = 1) -> int:
    """Count the floating-point operations of the matrix products and the expectations.

    Args:
        pairs: number of pairs.
        c: channels.
        bins: number of bins.
        k: value columns.
        weights: weight matrices.
    """
    return pairs * bins * (2 * c * weights + 2 * k)


def traffic(pairs: int, c: int, k: int, element_bytes: int, symmetric: bool) -> int:
    """Count the bytes read and written in device memory, weights apart.

    Args:
        pairs: number of pairs.
        c: channels.
        k: value columns.
        element_bytes: of an element of the tile.
        symmetric: the transposed pair is read, too.
    """
    return pairs * (c * element_bytes * (2 if symmetric else 1) + 4 * k)
