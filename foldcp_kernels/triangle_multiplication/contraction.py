"""Contract planes panel by panel: x_ij = sum_k a_ik b_jk, added up in float32 or wider."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def accumulated(dtype: torch.dtype, panels: int) -> torch.dtype:
    """Return the dtype in which the products of that many panels add up.

    Args:
        dtype: of the planes.
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
) -> Tensor:
    """Add one panel's contribution to the contraction.

    Args:
        acc: [B, d, T_r, T_c] so far, None at the first panel; changed in place without gradients.
        a: [B, d, T_r, K] (outgoing) or [B, d, K, T_r] (incoming).
        b: [B, d, T_c, K] (outgoing) or [B, d, K, T_c] (incoming).
        outgoing: which of the two updates.
        panels: in all; several add up in float32 or wider.
        out: where to write the first panel's, last stride 1; not under autograd.

    Returns:
        [B, d, T_r, T_c], in the dtype of `a` when there is one panel.
    """
    a, b = (a, b.transpose(-1, -2)) if outgoing else (a.transpose(-1, -2), b)
    wide = accumulated(a.dtype, panels)
    if torch.is_grad_enabled():
        product = (a @ b).to(wide)
        return product if acc is None else acc + product
    first = acc is None
    if first and out is not None:
        acc = out
    elif first:
        cols = b.shape[-1]
        # Rows padded to 16 keep the products and what reads them wide, whatever T_c is.
        acc = a.new_empty((*a.shape[:-1], -(-cols // 16) * 16), dtype=wide)[..., :cols]
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
