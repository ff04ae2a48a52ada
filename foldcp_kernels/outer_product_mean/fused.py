"""Outer product mean with its output projection and residual, one pass over the pair tile.

    z_ij += bias + sum_cd W[:, c, d] (1 / max(1, n_ij)) sum_s a_sic b_sjd

A program owns BI x BJ pairs and walks over the channels c in slices of BD. The outer products of
one slice are one product over the sequences, [BI * BD, S] @ [S, BJ * D]; reordered to
[BI * BJ, BD * D] they meet that slice of the weight. Both products have tensor-core shapes, and the
accumulators are one slice of outer products and the BI * BJ rows of the result.

Source: AlphaFold 3 supplement, Algorithm 9.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from foldcp_kernels.core.dispatch import compute_dtype
from foldcp_kernels.core.triton_configs import Config, pick
from foldcp_kernels.core.triton_launch import capability, cdiv, launch, next_power_of_2, packed
from foldcp_kernels.core.weight_cache import derived
from foldcp_kernels.norm_linear.fused import exactness


@triton.jit
def _outer_product_mean_kernel(
    p_z, p_a, p_b, p_count, p_w, p_bias, p_out, s_z, s_a, s_b, s_count, s_out, sizes,
    C: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, EXACT: tl.constexpr,
    BI: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    rows, cols, sequences = sizes
    i_i, i_j = tl.program_id(0) // tl.cdiv(cols, BJ), tl.program_id(0) % tl.cdiv(cols, BJ)
    i_b = tl.program_id(1).to(tl.int64)
    o_c = tl.program_id(2) * BC + tl.arange(0, BC)
    m_c = o_c < C
    # a [slices, S, rows * BD] and b [S, cols * D] are padded to whole blocks.
    o_m = i_i.to(tl.int64) * (BI * BD) + tl.arange(0, BI * BD)
    o_n = i_j.to(tl.int64) * (BJ * D) + tl.arange(0, BJ * D)
    o_s = tl.arange(0, BS).to(tl.int64)
    o_i, o_j = i_i * BI + tl.arange(0, BI), i_j * BJ + tl.arange(0, BJ)
    m_ij = (o_i < rows)[:, None] & (o_j < cols)[None, :]
    p_n = p_count + i_b * s_count[0] + o_i.to(tl.int64)[:, None] * s_count[1]
    b_n = tl.load(p_n + o_j.to(tl.int64)[None, :] * s_count[2], mask=m_ij, other=1.0)
    b_mean = 1.0 / tl.maximum(b_n.to(tl.float32), 1.0)  # [BI, BJ]
    b_y = tl.zeros([BI * BJ, BC], tl.float32)
    for i_d in tl.range(0, D // BD, num_stages=1):
        p_left = p_a + i_b * s_a[0] + tl.cast(i_d, tl.int64) * s_a[1] + o_m[None, :]
        p_right = p_b + i_b * s_b[0] + o_n[None, :]
        b_o = tl.zeros([BI * BD, BJ * D], tl.float32)
        for lo in tl.range(0, sequences, BS):
            b_a = tl.load(p_left + (lo + o_s)[:, None] * s_a[2])
            b_b = tl.load(p_right + (lo + o_s)[:, None] * s_b[1])
            b_o = tl.dot(tl.trans(b_a), b_b, b_o, input_precision=EXACT)
            # [BI * BD, BS] @ [BS, BJ * D] -> [BI * BD, BJ * D]
        b_o = b_o.reshape(BI, BD, BJ, D) * b_mean[:, None, :, None]
        # The mean before the cast: sums over sequences can leave the range of float16.
        b_o = b_o.to(p_w.dtype.element_ty).permute(0, 2, 1, 3).reshape(BI * BJ, BD * D)
        o_k = i_d * (BD * D) + tl.arange(0, BD * D)
        b_w = tl.load(p_w + o_c[:, None] * (D * D) + o_k[None, :], mask=m_c[:, None], other=0.0)
        b_y = tl.dot(b_o, tl.trans(b_w), b_y, input_precision=EXACT)
        # [BI * BJ, BD * D] @ [BD * D, BC] -> [BI * BJ, BC]
    b_y += tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    o_p = tl.arange(0, BI * BJ)
    o_i, o_j = (i_i * BI + o_p // BJ).to(tl.int64), (i_j * BJ + o_p % BJ).to(tl.int64)
    m_y = ((o_i < rows) & (o_j < cols))[:, None] & m_c[None, :]
    p_x = p_z + i_b * s_z[0] + o_i * s_z[1] + o_j * s_z[2]
    b_y += tl.load(p_x[:, None] + o_c[None, :] * s_z[3], mask=m_y, other=0.0).to(tl.float32)
    p_y = p_out + i_b * s_out[0] + o_i * s_out[1] + o_j * s_out[2]
    tl.store(p_y[:, None] + o_c[None, :] * s_out[3], b_y.to(p_out.dtype.element_ty), mask=m_y)


def outer_product_mean_fwd(
    z: Tensor, a: Tensor, b: Tensor, count: Tensor, weight: Tensor, bias: Tensor, in_place: bool
) -> Tensor:
    """Compute z + outer product mean.

    Args:
        z: [B, R, T, C], any strides.
        a: [B, S, R, D].
        b: [B, S, T, D], in the compute dtype.
        count: n_ij, float32 [B, R, T].
        weight: [C, D * D].
        bias: [C].
        in_place: write to `z`.

    Returns:
        `z`, or a new tensor like it.

    Source: AlphaFold 3 supplement, Algorithm 9.
    """
    batch, rows, cols, c = z.shape
    (bias,) = packed(bias)
    s, d = a.shape[1], a.shape[3]
    config = pick("outer_product_mean", a.element_size(), capability(z.device))
    width = max(16, next_power_of_2(d))
    bi, bj, bd = blocks(config, width)
    left, right = _operands(a, b, width, bi, bj, bd, config.blocks["BS"])
    w = weight
    if width != d or w.dtype != a.dtype or not w.is_contiguous():
        w = derived("outer_product_mean", (w,), lambda w: _padded(w, d, width, a.dtype), a.dtype)
    out = z if in_place else torch.empty_like(z)
    bc = min(128, max(16, next_power_of_2(c)))
    launch(
        _outer_product_mean_kernel,
        (cdiv(rows, bi) * cdiv(cols, bj), batch, cdiv(c, bc)),
        z, left, right, count, w, bias, out,
        z.stride(), left.stride()[:3], right.stride()[:2], count.stride(), out.stride(),
        (rows, cols, s),
        C=c, D=width, BC=bc, EXACT=exactness(a.dtype), BI=bi, BJ=bj, BD=bd, BS=config.blocks["BS"],
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out


def outer_product_mean(
    z: Tensor, a: Tensor, b: Tensor, count: Tensor, weight: Tensor, bias: Tensor,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `outer_product_mean`: its forward, in place where `out` is given."""
    dtype = compute_dtype(a)
    return outer_product_mean_fwd(
        z, a.to(dtype), b.to(dtype), count, weight, bias, in_place=out is not None
    )


def blocks(config: Config, width: int) -> tuple[int, int, int]:
    """Return (rows, columns, channels of a slice) of a program, from the sizes of its products.

    Args:
        config: of the kernel.
        width: D.
    """
    bd = max(1, config.blocks["BK"] // width)
    return config.blocks["BM"] // bd, max(1, config.blocks["BN"] // width), bd


def _operands(
    a: Tensor, b: Tensor, width: int, bi: int, bj: int, bd: int, bs: int
) -> tuple[Tensor, Tensor]:
    """a [B, slices, S, rows * BD] and b [B, S, cols * D], zeros up to whole blocks."""
    batch, s, rows, d = a.shape
    cols = b.shape[2]
    up = -(-s // bs) * bs
    if width != d:
        a, b = (F.pad(x, (0, width - d)) for x in (a, b))
    left = a.new_zeros((batch, width // bd, up, -(-rows // bi) * bi, bd))
    left[:, :, :s, :rows] = a.unflatten(-1, (-1, bd)).permute(0, 3, 1, 2, 4)
    right = b.new_zeros((batch, up, -(-cols // bj) * bj, width))
    right[:, :s, :cols] = b
    return left.flatten(3), right.flatten(2)


def _padded(weight: Tensor, d: int, width: int, dtype: torch.dtype) -> Tensor:
    w = weight.to(dtype).unflatten(1, (d, d))
    return F.pad(w, (0, width - d, 0, width - d)).flatten(1).contiguous()


def flops(b: int, rows: int, cols: int, s: int, d: int, c: int) -> int:
    """Count the floating-point operations of both matrix products.

    Args:
        b: batch.
        rows: of the tile.
        cols: columns of the tile.
        s: sequences.
        d: channels of a and b.
        c: channels of the tile.
    """
    return 2 * b * rows * cols * d * d * (s + c)


def traffic(b: int, rows: int, cols: int, c: int, element_bytes: int) -> int:
    """Count bytes read and written in device memory: the tile once; the rest comes from L2.

    Args:
        b: batch.
        rows: of the tile.
        cols: columns of the tile.
        c: channels of the tile.
        element_bytes: of an element.
    """
    return 2 * b * rows * cols * c * element_bytes
