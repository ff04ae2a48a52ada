"""Contract planes panel by panel: x_ij = sum_k a_ik b_jk, added up in float32 or wider."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from foldcp_kernels.core.chunking import chunk_length, spans
from foldcp_kernels.core.op import Op
from foldcp_kernels.triangle_multiplication.fp8 import Scaled, fault


def accumulated(dtype: torch.dtype, panels: int) -> torch.dtype:
    """Return the dtype in which the products of that many panels add up.

    Args:
        dtype: of the planes; of FP8 planes, that of the result.
        panels: their number.
    """
    return dtype if panels == 1 or dtype == torch.float64 else torch.float32


def contract(
    acc: Tensor | None,
    a: Tensor,
    b: Tensor,
    outgoing: bool,
    panels: int = 1,
    out: Tensor | None = None,
    scaled: Scaled | None = None,
) -> Tensor:
    """Add one panel's contribution to the contraction.

    Args:
        acc: [B, d, T_r, T_c] so far, None at the first panel; changed in place without gradients.
        a: [B, d, T_r, K] (outgoing) or [B, d, K, T_r] (incoming).
        b: [B, d, T_c, K] (outgoing) or [B, d, K, T_c] (incoming).
        outgoing: which of the two updates.
        panels: in all; several add up in float32 or wider.
        out: where to write the first panel's, last stride 1; not under autograd.
        scaled: what FP8 planes stand for; None where planes are numbers as they are.

    Returns:
        [B, d, T_r, T_c], in the dtype of `a` (or `scaled`) when there is one panel.
    """
    a, b = (a, b.transpose(-1, -2)) if outgoing else (a.transpose(-1, -2), b)
    wide = accumulated(a.dtype if scaled is None else scaled.dtype, panels)
    if torch.is_grad_enabled() and scaled is None:
        product = (a @ b).to(wide)
        return product if acc is None else acc + product
    first = acc is None
    if first and out is not None:
        acc = out
    elif first:
        cols = b.shape[-1]
        # Rows padded to 16 keep the products and what reads them wide, whatever T_c is.
        acc = a.new_empty((*a.shape[:-1], -(-cols // 16) * 16), dtype=wide)[..., :cols]
    assert acc is not None
    if scaled is not None:
        return FP8_PRODUCTS.run(scaled.runner, acc, a, b, scaled.scale, carry=not first)
    # One batched product per sample: no copies.
    for to, x, y in zip(acc.unbind(), a.unbind(), b.unbind(), strict=True):
        if wide == a.dtype:
            torch.baddbmm(to, x, y, beta=0 if first else 1, out=to)
        elif _widens(a.device):
            torch.baddbmm(to, x, y, beta=0 if first else 1, out_dtype=wide, out=to)
        elif first:
            to.copy_(x @ y)
        else:
            to.add_(x @ y)
    return acc


def _dequantised(to: Tensor, a: Tensor, b: Tensor, scale: Tensor, carry: bool) -> Tensor:
    """Contract FP8 planes as numbers of float32 or wider, some channels at a time."""
    wide = torch.promote_types(to.dtype, torch.float32)
    lines, inner = a.shape[2] + b.shape[3], a.shape[3]
    step = chunk_length(a.shape[1], len(a) * lines * inner * wide.itemsize, a.device)
    for lo, hi in spans(a.shape[1], step):
        for into, x, y in zip(to[:, lo:hi], a[:, lo:hi], b[:, lo:hi], strict=True):
            x, y = x.to(wide) * scale[lo:hi, None, None].to(wide), y.to(wide)
            if into.dtype == wide:
                torch.baddbmm(into, x, y, beta=int(carry), out=into)
            else:
                into.copy_(torch.baddbmm(into.to(wide), x, y, beta=int(carry)))
    return to


def _fused() -> Callable[..., Tensor]:
    from foldcp_kernels.triangle_multiplication.fused import fp8_contraction

    return fp8_contraction


@lru_cache
def _widens(device: torch.device) -> bool:
    """Tell whether torch adds low-precision products to a float32 matrix on this device."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    one = torch.ones((1, 16, 16), dtype=torch.bfloat16, device=device)
    out = torch.ones((1, 16, 16), device=device)
    try:
        torch.baddbmm(out, one, one, out_dtype=torch.float32, out=out)
    except (RuntimeError, TypeError):  # torch before 2.8
        return False
    return bool((out == 17).all())


FP8_PRODUCTS = Op(
    "triangle_multiplication contraction",
    eager=_dequantised,
    triton=_fused,
    covers=lambda z, *_: fault(z),
)
