"""LayerNorm and a projection of the channels, to rows or to channel-major planes.

    out = LN(x) W^T + bias

Source: AlphaFold 3 supplement, Algorithms 10, 12 to 15, 20 and 24 (the first lines of each).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from foldcp_kernels.core.arguments import check
from foldcp_kernels.core.chunking import chunk_length, spans
from foldcp_kernels.core.dispatch import check_dtype, compute_dtype
from foldcp_kernels.core.op import Op
from foldcp_kernels.norm_linear import definition

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


def slower(x: Tensor, outs: int = 0) -> str | None:
    """Return the reason why `auto` leaves an op on rows to torch, None where it does not.

    Wide float32 products take three passes on tensor cores, and small blocks. Up to `_FEW` output
    channels (`outs`) reading x is what costs, and one pass over it is less.

    Args:
        x: [B, I, J, C].
        outs: channels of the result, 0 where they are not bounded.
    """
    slow = compute_dtype(x) == torch.float32 and not 0 < outs <= _FEW
    return "float32 products go through cuBLAS" if slow else None


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
    return ROWS(x, gain, shift, weight, impl=impl)


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
    check("norm_linear_planes", x, gain, shift, weight, bias, out)
    if out is not None and out.shape[-1] > 1 and out.stride(-1) != 1:
        raise ValueError(
            f"norm_linear_planes: `out` has strides {out.stride()}; expected 1 as the last"
        )
    return PLANES.checked(x, gain, shift, weight, bias, out, impl=impl)


def _rows(x: Tensor, gain: Tensor | None, shift: Tensor | None, weight: Tensor) -> Tensor:
    return F.linear(F.layer_norm(x, x.shape[-1:], gain, shift, EPS), weight)


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


def _fused_rows() -> Callable[..., Tensor]:
    from foldcp_kernels.norm_linear.fused import rows

    return rows


def _fused_planes() -> Callable[..., Tensor]:
    from foldcp_kernels.norm_linear.fused import planes

    return planes


def _defined_planes(
    x: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    found = definition.norm_linear_planes(x, gain, shift, weight, bias)
    return found if out is None else out.copy_(found)


def _no_planes(x: Tensor, *given: Tensor | None) -> Tensor:
    weight, out = given[2], given[4]
    if out is not None:
        return out
    assert weight is not None
    return x.new_empty((len(x), len(weight), *x.shape[1:3]), dtype=compute_dtype(x))


ROWS = Op(
    "norm_linear",
    eager=_rows,
    triton=_fused_rows,
    covers=lambda x, *_: refusal(x, "x", (x.shape[-1],)),
    prefers=lambda x, gain, shift, weight: slower(x, len(weight)),
    definition=definition.norm_linear_rows,
    empty=lambda x, gain, shift, weight: x.new_empty(
        (*x.shape[:3], len(weight)), dtype=compute_dtype(x)
    ),
)
PLANES = Op(
    "norm_linear_planes",
    eager=_planes,
    triton=_fused_planes,
    covers=lambda x, *_: refusal(x, "x", (x.shape[-1],)),
    prefers=lambda x, gain, shift, weight, *_: slower(x, len(weight)),
    definition=_defined_planes,
    empty=_no_planes,
)
