"""Transition: x += (silu(LN(x) W1) * (LN(x) W2)) W3, the hidden layer only ever for a chunk.

Source: AlphaFold 3 supplement, Algorithm 11.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from foldcp_kernels.core.arguments import check
from foldcp_kernels.core.chunking import add_chunks, chunk_length, spans
from foldcp_kernels.core.dispatch import compute_dtype
from foldcp_kernels.core.recompute import nothing, recompute
from foldcp_kernels.norm_linear import EPS, cast, choose_rows
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
    check("transition", x, *vars(w).values())
    if not x.numel():
        return nothing(x, *vars(w).values())
    if impl == "reference":
        from foldcp_kernels.transition import definition

        return definition.transition(x, w)
    lead = max(0, 4 - x.ndim)  # a kernel takes [B, I, J, C]
    rows = x[(None,) * lead] if lead else x
    out = _update(rows, w, min(dim + lead, rows.ndim - 2), impl)
    return out.view(x.shape) if torch.is_grad_enabled() else x


def _update(x: Tensor, w: TransitionWeights, dim: int, impl: str | None) -> Tensor:
    """x [..., C] of 4 or more dimensions + its transition; in place when gradients are off."""
    if choose_rows("transition", impl, x, "x", (x.shape[-1],)) != "triton":
        total, hidden = x.shape[dim], w.fc1.shape[0]
        each = x.numel() // max(1, total * x.shape[-1]) * hidden * x.element_size() * 2
        cuts = spans(total, chunk_length(total, each, x.device))
        return add_chunks(x, dim, ((c, _swiglu(x.narrow(dim, c[0], c[1] - c[0]), w)) for c in cuts))
    from foldcp_kernels.transition.fused import transition_fwd

    dtype, in_place = compute_dtype(x), not torch.is_grad_enabled()

    def fused(x: Tensor, gain: Tensor, shift: Tensor, *fc: Tensor) -> Tensor:
        weights = [cast(f"fc{i}", dtype, f) for i, f in enumerate(fc)]
        return transition_fwd(x, gain, shift, *weights, out=x if in_place else None)

    def twin(x: Tensor, *weights: Tensor) -> Tensor:
        return _update(x, TransitionWeights(*weights), dim, "torch")

    return recompute(fused, twin, x, w.norm_weight, w.norm_bias, w.fc1, w.fc2, w.fc3)
