"""Contract FP8 planes: x_ij = scale_c sum_k a_ik b_jk, products of e4m3 added up in float32.

Loads are wide where each row of a plane begins at a multiple of 16 bytes, whatever N is: whole
blocks of k are read without a mask, and what is left of k in steps of `TAIL`. Planes that lie in
memory with k first (`channel`) are read through their strides. Programs of one channel run side by
side, so that its planes come from L2.

Source: AlphaFold 3 supplement, Algorithms 12 and 13.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from foldcp_kernels.attention.fused import load_bound
from foldcp_kernels.core.triton_configs import pick
from foldcp_kernels.core.triton_launch import capability, cdiv, launch

_VECTOR = 16  # bytes of the widest load


@triton.jit
def _fp8_contraction_kernel(
    p_a, p_b, p_scale, p_out, s_a, s_b, s_out, sizes,
    CARRY: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    channels, rows, cols, inner, rows_bound, cols_bound = sizes
    across = tl.cdiv(cols, BN)
    tiles = tl.cdiv(rows, BM) * across
    i_t = tl.program_id(0) % tiles
    i_p = (tl.program_id(0) // tiles).to(tl.int64)
    i_b, i_c = i_p // channels, i_p % channels
    o_m, o_n = i_t // across * BM + tl.arange(0, BM), i_t % across * BN + tl.arange(0, BN)
    m_m, m_n = (o_m < rows_bound)[:, None], (o_n < cols_bound)[None, :]
    p_a += i_b * s_a[0] + i_c * s_a[1] + o_m.to(tl.int64)[:, None] * s_a[2]
    p_b += i_b * s_b[0] + i_c * s_b[1] + o_n.to(tl.int64)[None, :] * s_b[2]
    b_x = tl.zeros([BM, BN], tl.float32)
    whole = inner // BK * BK
    for lo in tl.range(0, whole, BK):
        o_k = (lo + tl.arange(0, BK)).to(tl.int64)
        b_a = tl.load(p_a + o_k[None, :] * s_a[3], mask=m_m, other=0.0)
        b_b = tl.load(p_b + o_k[:, None] * s_b[3], mask=m_n, other=0.0)
        # sm_90 adds fewer than 32 bits within a product: in float32 from one block to the next.
        b_x = tl.dot(b_a, b_b, b_x, max_num_imprecise_acc=BK)  # [BM, BK] @ [BK, BN] -> [BM, BN]
    for lo in tl.range(whole, inner, TAIL):
        o_k = lo + tl.arange(0, TAIL)
        m_k, o_k = o_k < inner, o_k.to(tl.int64)
        b_a = tl.load(p_a + o_k[None, :] * s_a[3], mask=m_m & m_k[None, :], other=0.0)
        b_b = tl.load(p_b + o_k[:, None] * s_b[3], mask=m_n & m_k[:, None], other=0.0)
        b_x = tl.dot(b_a, b_b, b_x, max_num_imprecise_acc=TAIL)  # [BM, TAIL] @ [TAIL, BN]
    b_x *= tl.load(p_scale + i_c)
    p_x = p_out + i_b * s_out[0] + i_c * s_out[1]
    p_x += o_m.to(tl.int64)[:, None] * s_out[2] + o_n[None, :]
    m_x = (o_m < rows)[:, None] & (o_n < cols)[None, :]
    if CARRY:
        b_x += tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
    tl.store(p_x, b_x.to(p_out.dtype.element_ty), mask=m_x)


def fp8_contraction(to: Tensor, a: Tensor, b: Tensor, scale: Tensor, carry: bool) -> Tensor:
    """Write scale * a b to a tensor, or add it.

    Args:
        to: [B, d, M, N], last stride 1, changed in place.
        a: [B, d, M, K] in e4m3, stride 1 along M or K.
        b: [B, d, K, N] in e4m3, stride 1 along N or K.
        scale: [d], float32.
        carry: add to what `to` has.

    Returns:
        `to`.

    Source: AlphaFold 3 supplement, Algorithms 12 and 13.
    """
    (batch, channels, rows, inner), cols = a.shape, b.shape[-1]
    b = b.transpose(-1, -2)  # both [.., line, k]
    wide = all(_is_wide(x) for x in (a, b))
    name = "fp8_contraction" if wide else "fp8_contraction_bytes"
    config = pick(name, 1, capability(a.device))
    tiles = cdiv(rows, config.blocks["BM"]) * cdiv(cols, config.blocks["BN"])
    bounds = (x.shape[2] if x.stride(3) == 1 else load_bound(x.transpose(2, 3)) for x in (a, b))
    launch(
        _fp8_contraction_kernel, (tiles * batch * channels,), a, b, scale, to, a.stride(),
        b.stride(), to.stride()[:3], (channels, rows, cols, inner, *bounds), CARRY=carry,
        **config.options(),
    )  # fmt: skip
    return to


def _is_wide(x: Tensor) -> bool:
    """True where each row of a plane [B, d, line, k] begins at a multiple of the widest load."""
    offset = x.storage_offset() if x.device.type == "meta" else x.data_ptr()
    return all(n % _VECTOR == 0 for n in (offset, *x.stride()) if n != 1)


def flops(b: int, channels: int, rows: int, cols: int, inner: int) -> int:
    """Count the floating-point operations.

    Args:
        b: batch.
        channels: d.
        rows: M.
        cols: N.
        inner: K.
    """
    return 2 * b * channels * rows * cols * inner
