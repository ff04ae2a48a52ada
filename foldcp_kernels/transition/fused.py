"""Transition in one kernel: the hidden layer exists for one block of rows and channels at a time.

    x += (silu(LN(x) W1^T) * (LN(x) W2^T)) W3^T

Source: AlphaFold 3 supplement, Algorithm 11.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from foldcp_kernels.core.dispatch import compute_dtype
from foldcp_kernels.core.triton_configs import pick
from foldcp_kernels.core.triton_launch import capability, cdiv, launch, next_power_of_2, packed
from foldcp_kernels.core.weight_cache import cast
from foldcp_kernels.gated_output.fused import load_weight, place
from foldcp_kernels.norm_linear.fused import exactness, load_normed


@triton.jit
def _transition_kernel(
    p_x, p_gain, p_shift, p_w1, p_w2, p_w3, p_out, s_x, s_out, sizes, eps,
    C: tl.constexpr, BC: tl.constexpr, HIDDEN: tl.constexpr, RESIDUAL: tl.constexpr,
    EXACT: tl.constexpr, BP: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    lines, positions = sizes
    i_b, i_i, o_p = place(lines, positions, BP)
    m_p, o_c, o_p64 = o_p < positions, tl.arange(0, BC), o_p.to(tl.int64)
    p_rows = p_x + i_b * s_x[0] + i_i * s_x[1] + o_p64 * s_x[2]
    b_n, _ = load_normed(p_rows, m_p, s_x[3], p_gain, p_shift, C, BC, eps)
    b_n = b_n.to(p_w1.dtype.element_ty)  # [BP, BC]
    b_y = tl.zeros([BP, BC], tl.float32)
    for lo in tl.range(0, HIDDEN, BH):
        o_h = lo + tl.arange(0, BH)
        b_w = load_weight(p_w1, o_h, o_c, HIDDEN, C)
        b_h = tl.dot(b_n, tl.trans(b_w), input_precision=EXACT)  # [BP, BC] @ [BC, BH] -> [BP, BH]
        b_w = load_weight(p_w2, o_h, o_c, HIDDEN, C)
        b_u = tl.dot(b_n, tl.trans(b_w), input_precision=EXACT)  # [BP, BC] @ [BC, BH] -> [BP, BH]
        b_h = (b_h * tl.sigmoid(b_h) * b_u).to(p_w1.dtype.element_ty)
        b_w = load_weight(p_w3, o_c, o_h, C, HIDDEN)
        b_y = tl.dot(b_h, tl.trans(b_w), b_y, input_precision=EXACT)  # [BP, BH] @ [BH, BC]
    m_x = m_p[:, None] & (o_c < C)[None, :]
    if RESIDUAL:
        # Read again, which saves the registers that x would take through the loop.
        p_again = p_rows[:, None] + o_c[None, :] * s_x[3]
        b_y += tl.load(p_again, mask=m_x, other=0.0).to(tl.float32)
    p_rows = p_out + i_b * s_out[0] + i_i * s_out[1] + o_p64 * s_out[2]
    b_y = b_y.to(p_out.dtype.element_ty)
    tl.store(p_rows[:, None] + o_c[None, :] * s_out[3], b_y, mask=m_x)


def transition_fwd(
    x: Tensor, gain: Tensor, shift: Tensor, w1: Tensor, w2: Tensor, w3: Tensor,
    out: Tensor | None = None, residual: bool = True, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """Compute x + transition(x), or the transition alone.

    Args:
        x: [B, I, J, C], any strides.
        gain: scale of its LayerNorm [C].
        shift: shift of its LayerNorm [C].
        w1: [hidden, C], contiguous, in the compute dtype.
        w2: [hidden, C], contiguous, in the compute dtype.
        w3: [C, hidden], contiguous, in the compute dtype.
        out: where to write; `x` itself for in place, None for new.
        residual: add x.
        eps: of the LayerNorm.

    Returns:
        `out` [B, I, J, C].

    Source: AlphaFold 3 supplement, Algorithm 11.
    """
    b, i, j, c = x.shape
    gain, shift = packed(gain, shift)
    out = x.new_empty(x.shape) if out is None else out
    config = pick("transition", w1.element_size(), capability(x.device))
    launch(
        _transition_kernel,
        (cdiv(j, config.blocks["BP"]) * b * i,),
        x, gain, shift, w1, w2, w3, out, x.stride(), out.stride(), (i, j), eps,
        C=c, BC=max(16, next_power_of_2(c)), HIDDEN=w1.shape[0], RESIDUAL=residual,
        EXACT=exactness(w1.dtype), **config.options(),
    )  # fmt: skip
    return out


def transition(
    x: Tensor, gain: Tensor, shift: Tensor, fc1: Tensor, fc2: Tensor, fc3: Tensor,
    dim: int, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `transition`: its forward, without chunks along `dim`; `out` as in `transition_fwd`."""
    dtype = compute_dtype(x)
    w1, w2, w3 = (cast(w, dtype) for w in (fc1, fc2, fc3))
    return transition_fwd(x, gain, shift, w1, w2, w3, out)


def flops(positions: int, c: int, hidden: int) -> int:
    """Count the floating-point operations of the three matrix products.

    Args:
        positions: pairs or tokens.
        c: channels.
        hidden: channels of the hidden layer.
    """
    return 6 * positions * c * hidden


def traffic(positions: int, c: int, x_bytes: int) -> int:
    """Count the bytes read and written in device memory, weights apart.

    Args:
        positions: pairs or tokens.
        c: channels.
        x_bytes: of an element.
    """
    return 2 * positions * c * x_bytes
