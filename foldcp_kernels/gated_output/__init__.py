"""The end of an attention: gate from the input, output projection, residual.

    x += (sigmoid(LN(x) Wg^T) * o) Wo^T

Source: AlphaFold 3 supplement, Algorithms 10, 14 and 15 (last lines).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from foldcp_kernels.core.op import Op
from foldcp_kernels.gated_output import definition
from foldcp_kernels.norm_linear import EPS, refusal, slower


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
    return GATED_OUTPUT(x, gain, shift, gate, o, weight, impl=impl)


def _eager(
    x: Tensor, gain: Tensor, shift: Tensor, gate: Tensor, o: Tensor, weight: Tensor
) -> Tensor:
    g = F.linear(F.layer_norm(x, x.shape[-1:], gain, shift, EPS), gate).sigmoid_()
    update = F.linear(g * o.to(g.dtype), weight)
    return x + update if torch.is_grad_enabled() else x.add_(update)


def _fused() -> Callable[..., Tensor]:
    from foldcp_kernels.gated_output.fused import attention_output

    return attention_output


GATED_OUTPUT = Op(
    "gated_output",
    eager=_eager,
    triton=_fused,
    covers=lambda x, *_: refusal(x, "x", (x.shape[-1],)),
    prefers=lambda x, *_: slower(x),
    definition=definition.gated_output,
    in_place=True,
)
