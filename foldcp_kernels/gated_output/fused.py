"""The end of a triangle update: gate, output projection and residual in one pass, in place.

    attention:       x += (sigmoid(LN(x) Wg^T) * o) Wo^T      o [B, I, J, H D] in rows
    multiplication:  x += (LN(y) Wp^T) * sigmoid(LN(x) Wg^T)  y [B, D, I, J] in planes

The gate is computed again from x, so that nothing but o or y had to be kept.

Source: AlphaFold 3 supplement, Algorithms 10, 12, 13, 14 and 15 (last lines).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from foldcp_kernels.attention.fused import load_bound
from foldcp_kernels.core.dispatch import compute_dtype
from foldcp_kernels.core.triton_configs import pick
from foldcp_kernels.core.triton_launch import capability, cdiv, launch, next_power_of_2, packed
from foldcp_kernels.core.weight_cache import cast
from foldcp_kernels.norm_linear.fused import exactness, load_normed


@triton.jit
def place(lines, positions, BP: tl.constexpr):
    """Return (batch, line, positions of the block) of this program."""
    blocks = tl.cdiv(positions, BP)
    i_l = (tl.program_id(0) // blocks).to(tl.int64)
    o_p = tl.program_id(0) % blocks * BP + tl.arange(0, BP)
    return i_l // lines, i_l % lines, o_p


@triton.jit
def load_weight(p_w, o_row, o_col, rows, COLS: tl.constexpr):
    """Load a block of a contiguous [rows, COLS] matrix, zero past its ends."""
    m_w = (o_row < rows)[:, None] & (o_col < COLS)[None, :]
    return tl.load(p_w + o_row[:, None] * COLS + o_col[None, :], mask=m_w, other=0.0)


@triton.jit
def _attention_output_kernel(
    p_x, p_gain, p_shift, p_gate, p_o, p_w, p_out, s_x, s_o, s_out, sizes, eps,
    C: tl.constexpr, BC: tl.constexpr, W: tl.constexpr, EXACT: tl.constexpr,
    BP: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    lines, positions = sizes
    i_b, i_i, o_p = place(lines, positions, BP)
    m_p, o_c, o_p64 = o_p < positions, tl.arange(0, BC), o_p.to(tl.int64)
    p_rows = p_x + i_b * s_x[0] + i_i * s_x[1] + o_p64 * s_x[2]
    b_n, _ = load_normed(p_rows, m_p, s_x[3], p_gain, p_shift, C, BC, eps)
    b_n = b_n.to(p_w.dtype.element_ty)  # [BP, BC]
    p_o += i_b * s_o[0] + i_i * s_o[1]
    b_y = tl.zeros([BP, BC], tl.float32)
    for lo in tl.range(0, W, BH):
        o_h = lo + tl.arange(0, BH)
        b_g = load_weight(p_gate, o_h, o_c, W, C)
        b_g = tl.dot(b_n, tl.trans(b_g), input_precision=EXACT)  # [BP, BC] @ [BC, BH] -> [BP, BH]
        m_o = m_p[:, None] & (o_h < W)[None, :]
        b_o = tl.load(p_o + o_p64[:, None] * s_o[2] + o_h[None, :], mask=m_o, other=0.0)
        b_o = (b_o.to(tl.float32) * tl.sigmoid(b_g)).to(p_w.dtype.element_ty)
        b_w = load_weight(p_w, o_c, o_h, C, W)
        b_y = tl.dot(b_o, tl.trans(b_w), b_y, input_precision=EXACT)  # [BP, BH] @ [BH, BC]
    m_x = m_p[:, None] & (o_c < C)[None, :]
    # Read again: keeping x through the loop costs more registers than the cache costs time.
    b_x = tl.load(p_rows[:, None] + o_c[None, :] * s_x[3], mask=m_x, other=0.0).to(tl.float32)
    b_x = (b_x + b_y).to(p_out.dtype.element_ty)
    p_rows = p_out + i_b * s_out[0] + i_i * s_out[1] + o_p64 * s_out[2]
    tl.store(p_rows[:, None] + o_c[None, :] * s_out[3], b_x, mask=m_x)


@triton.jit
def _multiplication_output_kernel(
    p_x, p_gain, p_shift, p_gate, p_y, p_y_gain, p_y_shift, p_w, p_out,
    s_x, s_y, s_out, sizes, eps,
    C: tl.constexpr, BC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, RESIDUAL: tl.constexpr,
    EXACT: tl.constexpr, BP: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    lines, positions, padded = sizes
    i_b, i_i, o_p = place(lines, positions, BP)
    m_p, o_c, o_p64 = o_p < positions, tl.arange(0, BC), o_p.to(tl.int64)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    # Planes have their positions together: loaded as [BD, BP], up to `padded` for wide loads.
    p_plane = p_y + i_b * s_y[0] + i_i * s_y[2] + o_d.to(tl.int64)[:, None] * s_y[1] + o_p[None, :]
    b_y = tl.load(p_plane, mask=m_d[:, None] & (o_p < padded)[None, :], other=0.0).to(tl.float32)
    b_y = tl.where(m_p[None, :], b_y, 0.0)
    b_d = tl.where(m_d[:, None], b_y - (tl.sum(b_y, 0) / D)[None, :], 0.0)
    b_d *= tl.rsqrt(tl.sum(b_d * b_d, 0) / D + eps)[None, :]
    b_d *= tl.load(p_y_gain + o_d, mask=m_d, other=0.0).to(tl.float32)[:, None]
    b_d += tl.load(p_y_shift + o_d, mask=m_d, other=0.0).to(tl.float32)[:, None]
    b_y = tl.trans(b_d).to(p_w.dtype.element_ty)  # [BP, BD]
    p_rows = p_x + i_b * s_x[0] + i_i * s_x[1] + o_p64 * s_x[2]
    b_n, _ = load_normed(p_rows, m_p, s_x[3], p_gain, p_shift, C, BC, eps)
    b_n = b_n.to(p_w.dtype.element_ty)  # [BP, BC]
    p_to = p_out + i_b * s_out[0] + i_i * s_out[1] + o_p64 * s_out[2]
    for lo in tl.range(0, C, BO):
        o_o = lo + tl.arange(0, BO)
        b_w = load_weight(p_w, o_o, o_d, C, D)
        b_u = tl.dot(b_y, tl.trans(b_w), input_precision=EXACT)  # [BP, BD] @ [BD, BO] -> [BP, BO]
        b_g = load_weight(p_gate, o_o, o_c, C, C)
        b_g = tl.dot(b_n, tl.trans(b_g), input_precision=EXACT)  # [BP, BC] @ [BC, BO] -> [BP, BO]
        m_x = m_p[:, None] & (o_o < C)[None, :]
        b_x = b_u * tl.sigmoid(b_g)
        if RESIDUAL:
            b_x += tl.load(p_rows[:, None] + o_o[None, :] * s_x[3], mask=m_x, other=0.0).to(
                tl.float32
            )
        b_x = b_x.to(p_out.dtype.element_ty)
        tl.store(p_to[:, None] + o_o[None, :] * s_out[3], b_x, mask=m_x)


def attention_output_fwd(
    x: Tensor, gain: Tensor, shift: Tensor, gate: Tensor, o: Tensor, w: Tensor,
    out: Tensor | None = None, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """Compute x + (sigmoid(LN(x) gate^T) * o) w^T.

    Args:
        x: [B, I, J, C], any strides.
        gain: scale of its LayerNorm [C].
        shift: shift of its LayerNorm [C].
        gate: [W, C], contiguous, in the compute dtype.
        w: [C, W], contiguous, in the compute dtype.
        o: [B, I, J, W], last stride 1.
        out: where to write; `x` itself for in place, None for new.
        eps: of the LayerNorm.

    Returns:
        `out` [B, I, J, C].

    Source: AlphaFold 3 supplement, Algorithm 14.
    """
    b, i, j, c = x.shape
    gain, shift = packed(gain, shift)
    out = x.new_empty(x.shape) if out is None else out
    config = pick("attention_output", w.element_size(), capability(x.device))
    launch(
        _attention_output_kernel,
        (cdiv(j, config.blocks["BP"]) * b * i,),
        x, gain, shift, gate, o, w, out, x.stride(), o.stride()[:3], out.stride(), (i, j), eps,
        C=c, BC=max(16, next_power_of_2(c)), W=w.shape[1], EXACT=exactness(w.dtype),
        **config.options(),
    )  # fmt: skip
    return out


def multiplication_output_fwd(
    x: Tensor, gain: Tensor, shift: Tensor, gate: Tensor,
    y: Tensor, y_gain: Tensor, y_shift: Tensor, w: Tensor,
    out: Tensor | None = None, residual: bool = True, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """Compute x + (LN(y) w^T) * sigmoid(LN(x) gate^T).

    Args:
        x: [B, I, J, C], any strides.
        gain: scale of its LayerNorm [C].
        shift: shift of its LayerNorm [C].
        gate: [C, C], contiguous, in the compute dtype.
        w: [C, D], contiguous, in the compute dtype.
        y: planes [B, D, I, J], last stride 1.
        y_gain: scale of its LayerNorm [D].
        y_shift: shift of its LayerNorm [D].
        out: where to write; `x` itself for in place, None for new.
        residual: add x.
        eps: of the LayerNorm.

    Returns:
        `out` [B, I, J, C].

    Source: AlphaFold 3 supplement, Algorithm 12.
    """
    b, i, j, c = x.shape
    gain, shift, y_gain, y_shift = packed(gain, shift, y_gain, y_shift)
    d = y.shape[1]
    out = x.new_empty(x.shape) if out is None else out
    config = pick("multiplication_output", w.element_size(), capability(x.device))
    launch(
        _multiplication_output_kernel,
        (cdiv(j, config.blocks["BP"]) * b * i,),
        x, gain, shift, gate, y, y_gain, y_shift, w, out,
        x.stride(), y.stride()[:3], out.stride(), (i, j, load_bound(y)), eps,
        C=c, BC=max(16, next_power_of_2(c)), D=d, BD=max(16, next_power_of_2(d)),
        RESIDUAL=residual, EXACT=exactness(w.dtype), **config.options(),
    )  # fmt: skip
    return out


def attention_output(
    x: Tensor, gain: Tensor, shift: Tensor, gate: Tensor, o: Tensor, weight: Tensor,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `gated_output`: its forward; `out` is as in `attention_output_fwd`."""
    dtype = compute_dtype(x)
    o = o if o.stride(-1) == 1 else o.contiguous()
    return attention_output_fwd(x, gain, shift, cast(gate, dtype), o, cast(weight, dtype), out)


def multiplication_output(
    z: Tensor, gain: Tensor, shift: Tensor, g_out: Tensor,
    x: Tensor, x_gain: Tensor, x_shift: Tensor, p_out: Tensor,
    residual: bool, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Run the output of a triangle multiplication.

    Args:
        z: [B, I, J, C].
        gain: [C].
        shift: [C].
        g_out: [C, C], in any dtype.
        x: the contraction [B, D, I, J], any strides.
        x_gain: [D].
        x_shift: [D].
        p_out: [C, D], in any dtype.
        residual: add z; without it, `out` is left as it is.
        out: as in `multiplication_output_fwd`.
    """
    dtype, out = compute_dtype(z), out if residual else None
    gate, weight = cast(g_out, dtype), cast(p_out, dtype)
    x = x if x.stride(-1) == 1 else x.contiguous()
    return multiplication_output_fwd(
        z, gain, shift, gate, x, x_gain, x_shift, weight, out, residual
    )


def flops(positions: int, c: int, width: int) -> int:
    """Count the operations of gate and projection; `width` is H D, or D of the planes.

    Args:
        positions: pairs of the tile.
        c: channels of the tile.
        width: H D, or D of the planes.
    """
    return 2 * positions * c * (2 * width)


def traffic(positions: int, c: int, width: int, x_bytes: int, o_bytes: int) -> int:
    """Count the bytes read and written in device memory, weights apart.

    Args:
        positions: pairs of the tile.
        c: channels of the tile.
        width: H D, or D of the planes.
        x_bytes: of an element of x.
        o_bytes: of an element of o.
    """
    return positions * (2 * c * x_bytes + width * o_bytes)
