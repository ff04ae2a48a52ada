"""Transition: x += (silu(LN(x) W1) * (LN(x) W2)) W3, the hidden layer only ever for a chunk.

Source: AlphaFold 3 supplement, Algorithm 11.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from foldcp_kernels.core.arguments import check
from foldcp_kernels.core.chunking import add_chunks, chunk_length, spans
from foldcp_kernels.core.op import Op
from foldcp_kernels.norm_linear import EPS, refusal, slower
from foldcp_kernels.transition import definition
from foldcp_kernels.transition.definition import TransitionWeights


def swiglu(x: Tensor, w: TransitionWeights) -> Tensor:
    """Compute the transition without the residual, in torch: [..., C] -> [..., C_out].

    Args:
        x: [..., C].
        w: weights.

    Raises:
        ValueError: a shape or dtype that does not fit.
    """
    check("swiglu", x, *vars(w).values())
    return _swiglu(x, w)


def _swiglu(x: Tensor, w: TransitionWeights) -> Tensor:
    x = F.layer_norm(x, x.shape[-1:], w.norm_weight, w.norm_bias, EPS)
    return F.linear(F.silu(F.linear(x, w.fc1)) * F.linear(x, w.fc2), w.fc3)


def transition(x: Tensor, w: TransitionWeights, dim: int = 1, impl: str | None = None) -> Tensor:
    """Compute x + transition(x); in place when gradients are off.

    Args:
        x: [..., C].
        w: weights, C_out = C. The fused kernel takes up to 4 dimensions and 256 channels: wider
            rows are few and their weights large, which products of cuBLAS read once, a kernel once
            for every block of rows.
        dim: the dimension that torch works along in chunks.
        impl: see `dispatch`.

    Returns:
        `x` itself, changed, when gradients are off; else a new tensor.

    Raises:
        ValueError: a shape or dtype that does not fit, or a named `impl` that cannot run.

    Source: AlphaFold 3 supplement, Algorithm 11.
    """
    lead = max(0, 4 - x.ndim)  # a kernel takes [B, I, J, C]
    rows = x[(None,) * lead] if lead else x
    out = _TRANSITION(rows, *vars(w).values(), impl=impl, dim=min(dim + lead, rows.ndim - 2))
    return x if out is rows else out.view(x.shape)


def _eager(x: Tensor, *weights: Tensor, dim: int) -> Tensor:
    w, total = TransitionWeights(*weights), x.shape[dim]
    each = x.numel() // (total * x.shape[-1]) * w.fc1.shape[0] * x.element_size() * 2
    cuts = spans(total, chunk_length(total, each, x.device))
    return add_chunks(x, dim, ((c, _swiglu(x.narrow(dim, c[0], c[1] - c[0]), w)) for c in cuts))


def _fused() -> Callable[..., Tensor]:
    from foldcp_kernels.transition.fused import transition

    return transition


_TRANSITION = Op(
    "transition",
    eager=_eager,
    triton=_fused,
    covers=lambda x, *_: refusal(x, "x", (x.shape[-1],)),
    prefers=lambda x, *_: slower(x),
    definition=lambda x, *w, dim: definition.transition(x, TransitionWeights(*w)),
    in_place=True,
)
