"""The end of an attention: gate from the input, output projection, residual.

    x += (sigmoid(LN(x) Wg^T) * o) Wo^T

Source: AlphaFold 3 supplement, Algorithms 10, 14 and 15 (last lines).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from foldcp_kernels.core.arguments import check
from foldcp_kernels.core.dispatch import compute_dtype
from foldcp_kernels.core.recompute import nothing, recompute
from foldcp_kernels.norm_linear import EPS, cast, choose_rows


def gated_output(
    x: Tensor,
    gain: Tensor,
    shift: Tensor,
    gate: Tensor,
    o: Tensor,
    weight: Tensor,
    impl: str | None = None,
) -> Tensor:
    """Compute x + (sigmoid(LN(x) gate^T) * o) weight^T; in place when gradients are off.

    Args:
        x: [B, I, J, C], any strides.
        gain: scale of its LayerNorm [C].
        shift: shift of its LayerNorm [C].
        gate: [W, C].
        o: attention output [B, I, J, W].
        weight: [C, W].
        impl: see `dispatch`.

    Returns:
        `x` itself, changed, when gradients are off; else a new tensor.

    Raises:
        ValueError: a shape or dtype that does not fit, or a named `impl` that cannot run.

    Source: AlphaFold 3 supplement, Algorithm 14.
    """
    check("gated_output", x, gain, shift, gate, o, weight)
    if not x.numel():
        return nothing(x, gain, shift, gate, o, weight)
    if choose_rows("gated_output", impl, x, "x", (x.shape[-1],)) != "triton":
        update = _update(x, gain, shift, gate, o, weight)
        return x + update if torch.is_grad_enabled() else x.add_(update)
    from foldcp_kernels.gated_output.fused import attention_output_fwd

    dtype = compute_dtype(x)
    in_place = not torch.is_grad_enabled()

    def fused(*t: Tensor) -> Tensor:
        x, gain, shift, gate, o, weight = t
        gate, weight = cast("gate", dtype, gate), cast("out", dtype, weight)
        out = x if in_place else None
        o = o if o.stride(-1) == 1 else o.contiguous()
        return attention_output_fwd(x, gain, shift, gate, o, weight, out)

    return recompute(fused, lambda x, *t: x + _update(x, *t), x, gain, shift, gate, o, weight)


def _update(
    x: Tensor, gain: Tensor, shift: Tensor, gate: Tensor, o: Tensor, weight: Tensor
) -> Tensor:
    g = F.linear(F.layer_norm(x, x.shape[-1:], gain, shift, EPS), gate).sigmoid_()
    return F.linear(g * o.to(g.dtype), weight)
