"""LayerNorm and projection of a pair tile in one pass, to rows or to channel-major planes.

    y = LN(x) W^T + bias                          rows: q, k, v of triangle attention
    y = mask * sigmoid(LN(x) Wg^T) * (LN(x) W^T)  planes: a, b of triangle multiplication

Planes [B, O, I, J] are what contractions and attention biases read; their rows are padded in memory
to a multiple of 16, so that later loads are wide for any J. The ending node and the incoming update
pass `x.transpose(1, 2)`: the kernel reads through strides. Matrix products take the dtype of `w`
and accumulate in float32; LayerNorm is float32.

Source: AlphaFold 3 supplement, Algorithms 12 to 15 (first lines), 20 and 24 (biases).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foldcp_kernels.core.dispatch import compute_dtype
from foldcp_kernels.core.triton_configs import pick
from foldcp_kernels.core.triton_launch import (
    INTERPRETED,
    capability,
    cdiv,
    launch,
    next_power_of_2,
    packed,
)
from foldcp_kernels.core.weight_cache import cast, derived
from foldcp_kernels.norm_linear.planes import of_both_halves, padded_planes


@triton.jit
def load_normed(p_x, m_x, s_channel, p_gain, p_shift, C: tl.constexpr, BC: tl.constexpr, eps):
    """Load and normalise a block of rows: (normed and raw [BP, BC] in float32)."""
    o_c = tl.arange(0, BC)
    m_c = o_c < C
    b_x = tl.load(
        p_x[:, None] + o_c[None, :] * s_channel, mask=m_x[:, None] & m_c[None, :], other=0.0
    )
    b_x = b_x.to(tl.float32)
    b_mean = tl.sum(b_x, 1) / C
    b_d = tl.where(m_c[None, :], b_x - b_mean[:, None], 0.0)
    b_rstd = tl.rsqrt(tl.sum(b_d * b_d, 1) / C + eps)
    b_n = b_d * b_rstd[:, None]
    if p_gain is not None:
        b_n *= tl.load(p_gain + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
        b_n += tl.load(p_shift + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    return b_n, b_x


@triton.jit
def _norm_linear_kernel(
    p_x, p_gain, p_shift, p_w, p_gate, p_bias, p_mask, p_out, p_rest,
    s_x, s_mask, s_out, s_rest, sizes, eps,
    C: tl.constexpr, BC: tl.constexpr, PLANES: tl.constexpr, EXACT: tl.constexpr,
    BP: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    lines, positions, padded, outs, cut = sizes
    blocks = tl.cdiv(positions, BP)
    i_p = tl.program_id(0) % blocks
    i_l = (tl.program_id(0) // blocks).to(tl.int64)
    i_b, i_i = i_l // lines, i_l % lines
    o_p = i_p * BP + tl.arange(0, BP)
    m_p = o_p < positions
    o_c = tl.arange(0, BC)
    m_c = o_c < C
    p_rows = p_x + i_b * s_x[0] + i_i * s_x[1] + o_p.to(tl.int64) * s_x[2]
    b_n, _ = load_normed(p_rows, m_p, s_x[3], p_gain, p_shift, C, BC, eps)
    b_n = b_n.to(p_w.dtype.element_ty)  # [BP, BC]
    if p_mask is not None:
        p_keep = p_mask + i_b * s_mask[0] + i_i * s_mask[1] + o_p.to(tl.int64) * s_mask[2]
        b_keep = tl.load(p_keep, mask=m_p, other=0.0).to(tl.float32)
    p_line = p_out + i_b * s_out[0] + i_i * s_out[1]
    if p_rest is not None:
        p_far = p_rest + i_b * s_rest[0] + i_i * s_rest[1] - cut
    for lo in tl.range(0, outs, BO):
        o_o = lo + tl.arange(0, BO)
        m_o = o_o < outs
        o_w = o_o[:, None] * C + o_c[None, :]
        m_w = m_o[:, None] & m_c[None, :]
        b_w = tl.load(p_w + o_w, mask=m_w, other=0.0)
        b_y = tl.dot(b_w, tl.trans(b_n), input_precision=EXACT)  # [BO, BC] @ [BC, BP] -> [BO, BP]
        if p_bias is not None:
            b_y += tl.load(p_bias + o_o, mask=m_o, other=0.0).to(tl.float32)[:, None]
        if p_gate is not None:
            b_w = tl.load(p_gate + o_w, mask=m_w, other=0.0)
            b_g = tl.dot(b_w, tl.trans(b_n), input_precision=EXACT)  # [BO, BC] @ [BC, BP]
            b_y *= tl.sigmoid(b_g)
        if p_mask is not None:
            b_y *= b_keep[None, :]
        b_y = b_y.to(p_out.dtype.element_ty)
        if PLANES:
            # Up to `padded`, a multiple of 16, so that stores are wide; the padding is never read.
            p_y = p_line + o_o.to(tl.int64)[:, None] * s_out[2] + o_p[None, :]
            tl.store(p_y, b_y, mask=m_o[:, None] & (o_p < padded)[None, :])
        else:
            p_row, s_row = p_line, s_out[2]
            if p_rest is not None:  # a block of outputs lies in one of the two: BO divides `cut`
                p_row = tl.where(lo < cut, p_line, p_far)
                s_row = tl.where(lo < cut, s_out[2], s_rest[2])
            p_y = p_row + o_p.to(tl.int64)[:, None] * s_row + o_o[None, :]
            tl.store(p_y, tl.trans(b_y), mask=m_p[:, None] & m_o[None, :])


def exactness(dtype: torch.dtype) -> str:
    """Return the precision of float32 dots: as torch's, or three passes on tensor cores."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if tf32 else "tf32x3"


def norm_linear_fwd(
    x: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    w: Tensor,
    *,
    planes: bool,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    out: Tensor | None = None,
    rest: Tensor | None = None,
    dtype: torch.dtype | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise the channels and project them.

    Args:
        x: [B, I, J, C], any strides.
        gain: scale of the LayerNorm [C], None for none.
        shift: its shift [C].
        w: [O, C] in the compute dtype, contiguous.
        gate: [O, C] in the compute dtype, contiguous, for sigmoid(LN(x) gate^T).
        planes: write [B, O, I, J] instead of [B, I, J, O].
        bias: [O].
        mask: [B, I, J], 1 = keep.
        out: where to write, last stride 1; None for a new tensor.
        rest: where to write the outputs that `out` [B, I, J, o] has no place for, [B, I, J, O - o].
        dtype: of new planes, None for that of `w`.
        eps: of the LayerNorm.

    Returns:
        [B, O, I, J] (row stride a multiple of 16) or [B, I, J, O].

    Source: AlphaFold 3 supplement, Algorithms 12 to 15.
    """
    (b, i, j, c), outs = x.shape, w.shape[0]
    gain, shift, bias = packed(gain, shift, bias)
    # What lies behind the rows of given planes is not ours to write to.
    padded = j if planes and out is not None else -(-j // 16) * 16
    out = _room(x, outs, planes, dtype or w.dtype) if out is None else out
    cut, s_rest = outs, None
    s_out = tuple(out.stride(d) for d in ((0, 2, 1) if planes else (0, 1, 2)))
    name = "norm_linear" if gate is None else "norm_linear_gated"
    config = pick(name, w.element_size(), capability(x.device))
    if rest is not None:
        assert not planes and gate is None and bias is None and mask is None
        cut, s_rest = out.shape[3], rest.stride()[:3]
        if cut % config.blocks["BO"]:
            for weight, part in ((w[:cut], out), (w[cut:], rest)):
                norm_linear_fwd(x, gain, shift, weight, planes=False, out=part, eps=eps)
            return out
    launch(
        _norm_linear_kernel, (cdiv(j, config.blocks["BP"]) * b * i,),
        x, gain, shift, w, gate, bias, mask, out, rest, x.stride(),
        None if mask is None else mask.stride(), s_out, s_rest, (i, j, padded, outs, cut), eps, C=c,
        BC=max(16, next_power_of_2(c)), PLANES=planes, EXACT=exactness(w.dtype), **config.options(),
    )  # fmt: skip
    return out


def _room(x: Tensor, outs: int, planes: bool, dtype: torch.dtype) -> Tensor:
    if planes:
        return padded_planes(x, outs, dtype)
    return x.new_empty((*x.shape[:3], outs), dtype=dtype)


def rows(x: Tensor, gain: Tensor | None, shift: Tensor | None, weight: Tensor) -> Tensor:
    """See `norm_linear_rows`: its forward."""
    w = cast(weight, compute_dtype(x))
    return norm_linear_fwd(x, gain, shift, w, planes=False)


def planes(
    x: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """See `norm_linear_planes`: its forward."""
    w = cast(weight, compute_dtype(x))
    return norm_linear_fwd(x, gain, shift, w, planes=True, bias=bias, out=out)


def gated_planes(
    z: Tensor,
    mask: Tensor | None,
    gain: Tensor,
    shift: Tensor,
    p_in: Tensor,
    g_in: Tensor,
    out: Tensor | None,
    channels: tuple[int, int] | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """Project to the planes a and b of a triangle multiplication.

    Args:
        z: [B, I, J, C].
        mask: [B, I, J] or None.
        gain: [C].
        shift: [C].
        p_in: [2D, C], in any dtype.
        g_in: [2D, C], in any dtype.
        out: [B, 2d, I, J] or None.
        channels: which of D (start, stop), None for all.
        dtype: of the planes, None for what is computed in.
    """
    computed = compute_dtype(z)

    def part(m: Tensor) -> Tensor:
        return of_both_halves(m, channels).to(computed).contiguous()

    p, g = (derived("planes", (m,), part, computed, channels) for m in (p_in, g_in))
    if INTERPRETED and (dtype or p.dtype).itemsize == 1:  # the interpreter's casts to FP8 truncate
        planes = norm_linear_fwd(z, gain, shift, p, planes=True, gate=g, mask=mask)
        return (_room(z, len(p), True, dtype or p.dtype) if out is None else out).copy_(planes)
    return norm_linear_fwd(z, gain, shift, p, planes=True, gate=g, mask=mask, out=out, dtype=dtype)


def flops(b: int, i: int, j: int, c: int, outs: int) -> int:
    """Count the floating-point operations of the matrix product.

    Args:
        b: batch.
        i: rows of the tile.
        j: columns of the tile.
        c: channels.
        outs: channels of the result.
    """
    return 2 * b * i * j * c * outs


def traffic(b: int, i: int, j: int, c: int, outs: int, in_bytes: int, out_bytes: int) -> int:
    """Count the bytes read and written in device memory, weights apart.

    Args:
        b: batch.
        i: rows of the tile.
        j: columns of the tile.
        c: channels.
        outs: channels of the result.
        in_bytes: of an element of x.
        out_bytes: of an element of the result.
    """
    return b * i * j * (c * in_bytes + outs * out_bytes)
