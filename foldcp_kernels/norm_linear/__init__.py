"""LayerNorm and a projection of the channels, to rows or to channel-major planes.

    out = LN(x) W^T + bias

Source: AlphaFold 3 supplement, Algorithms 10, 12 to 15, 20 and 24 (the first lines of each).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from foldcp_kernels.core.arguments import check
from foldcp_kernels.core.chunking import chunk_length, spans
from foldcp_kernels.core.dispatch import check_dtype, choose, compute_dtype, derived
from foldcp_kernels.core.recompute import nothing, recompute

EPS = 1e-5
_FEW = 64
MAX_CHANNELS = 256  # a block of rows and its LayerNorm must fit one program


def refusal(x: Tensor, name: str, widths: tuple[int, ...]) -> str | None:
    """Return the reason why the fused row kernels cannot take `x` [B, I, J, C]; else None.

    Args:
        x: the tile.
        name: of the argument.
        widths: channels that one program must hold, those of `x` first.
    """
    if x.ndim != 4:
        return f"`{name}` has {x.ndim} dimensions; expected 4, [B, I, J, C]"
    if widths[0] > MAX_CHANNELS:
        return f"`{name}` has {widths[0]} channels; expected at most {MAX_CHANNELS}"
    if max(widths) > MAX_CHANNELS:
        return f"there are {max(widths)} hidden channels; expected at most {MAX_CHANNELS}"
    return check_dtype(x, name)


def choose_rows(
    op: str, impl: str | None, x: Tensor, name: str, widths: tuple[int, ...], outs: int = 0
) -> str:
    """Choose the implementation of an op on rows.

    `auto` leaves wide float32 products to torch: tensor cores take three passes and small blocks.
    Up to `_FEW` output channels (`outs`) reading x is what costs, and one pass over it is less.

    Args:
        op: its name.
        impl: see `dispatch`.
        x: [B, I, J, C].
        name: of the argument, for messages.
        widths: channels that one program must hold.
        outs: channels of the result, 0 where they are not bounded.
    """
    reason = refusal(x, name, widths)
    slow = compute_dtype(x) == torch.float32 and not 0 < outs <= _FEW
    return choose(op, impl, x, reason, "float32 products go through cuBLAS" if slow else None)


def cast(name: str, dtype: torch.dtype, *weights: Tensor) -> Tensor:
    """Stack weights along their rows, contiguous and in `dtype`; made once while they live.

    Args:
        name: of the derived weights.
        dtype: of the result.
        weights: [rows, C] each.
    """
    return derived(name, weights, lambda *w: torch.cat(w).to(dtype).contiguous(), dtype)


def norm_linear_rows(
    x: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    impl: str | None = None,
) -> Tensor:
    """Compute LN(x) W^T.

    Args:
        x: [B, I, J, C].
        gain: scale of the LayerNorm [C] or None.
        shift: shift of the LayerNorm [C] or None.
        weight: [O, C].
        impl: see `dispatch`.

    Returns:
        [B, I, J, O] in the compute dtype (autocast's, else that of `x`).

    Raises:
        ValueError: a shape or dtype that does not fit, or a named `impl` that cannot run.

    Source: AlphaFold 3 supplement, Algorithm 14.
    """
    check("norm_linear", x, gain, shift, weight, None, None)
    if not x.numel():
        out = x.new_empty((*x.shape[:3], len(weight)), dtype=compute_dtype(x))
        return nothing(out, x, gain, shift, weight)
    if choose_rows("norm_linear", impl, x, "x", (x.shape[-1],), len(weight)) != "triton":
        return F.linear(F.layer_norm(x, x.shape[-1:], gain, shift, EPS), weight)
    from foldcp_kernels.norm_linear.fused import norm_linear_fwd

    dtype = compute_dtype(x)

    def fused(x: Tensor, gain: Tensor | None, shift: Tensor | None, weight: Tensor) -> Tensor:
        return norm_linear_fwd(x, gain, shift, cast("rows", dtype, weight), planes=False)

    def twin(x: Tensor, gain: Tensor | None, shift: Tensor | None, weight: Tensor) -> Tensor:
        return norm_linear_rows(x, gain, shift, weight, "torch")

    return recompute(fused, twin, x, gain, shift, weight)


def norm_linear_planes(
    x: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Compute LN(x) W^T + bias in channel-major planes: the biases of attention layers.

    Args:
        x: [B, I, J, C], any strides.
        gain: scale of the LayerNorm [C] or None.
        shift: shift of the LayerNorm [C] or None.
        weight: [O, C], the heads of all layers stacked.
        bias: [O] or None.
        out: where to write [B, O, I, J], last stride 1; not under autograd.
        impl: see `dispatch`.

    Returns:
        [B, O, I, J] in the compute dtype (or `out`); rows may be padded in memory.

    Raises:
        ValueError: a shape or dtype that does not fit, or a named `impl` that cannot run.

    Source: AlphaFold 3 supplement, Algorithms 14, 20 and 24.
    """
    check("norm_linear", x, gain, shift, weight, bias, out)
    if out is not None and out.shape[-1] > 1 and out.stride(-1) != 1:
        raise ValueError(f"norm_linear: `out` has strides {out.stride()}; expected 1 as the last")
    if not x.numel():
        if out is None:
            b, i, j, _ = x.shape
            out = x.new_empty((b, len(weight), i, j), dtype=compute_dtype(x))
        return nothing(out, x, gain, shift, weight, bias)
    if choose_rows("norm_linear_planes", impl, x, "x", (x.shape[-1],), len(weight)) != "triton":
        return _planes(x, gain, shift, weight, bias, out)
    from foldcp_kernels.norm_linear.fused import norm_linear_fwd

    dtype = compute_dtype(x)

    def fused(
        x: Tensor, gain: Tensor | None, shift: Tensor | None, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        w = cast("planes", dtype, weight)
        return norm_linear_fwd(x, gain, shift, w, planes=True, bias=bias, out=out)

    return recompute(fused, _planes, x, gain, shift, weight, bias)


def _planes(
    x: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    b, rows, cols, c = x.shape
    step = chunk_length(rows, b * cols * (c + weight.shape[0]) * x.element_size() * 2, x.device)
    parts = []
    for lo, hi in spans(rows, step):
        y = F.linear(F.layer_norm(x[:, lo:hi], (c,), gain, shift, EPS), weight, bias)
        y = y.permute(0, 3, 1, 2)
        if torch.is_grad_enabled():
            parts.append(y)
            continue
        if out is None:
            out = y.new_empty((b, weight.shape[0], rows, cols))
        out[:, :, lo:hi] = y
    return torch.cat(parts, 2) if parts else out
