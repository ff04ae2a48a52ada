"""Conditioned LayerNorm and gated residual of the diffusion transformers.

    adaptive_norm = LN(a) * f(scale) + shift,    gated_residual = a + f(gate) * x

f is the sigmoid where `sigmoid` is set. Conditioning that serves many steps (atoms) is passed with
its sigmoid taken; what serves one call (tokens) is passed as logits, which saves passes on a GPU.

Source: AlphaFold 3 supplement, Algorithms 24 and 25 (gates) and 26.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from foldcp_kernels.core.arguments import check
from foldcp_kernels.core.dispatch import check_dtype, choose, compute_dtype
from foldcp_kernels.core.recompute import recompute

EPS = 1e-5
MAX_CHANNELS = 4096  # a row of the kernel stays in registers


def adaptive_norm(
    a: Tensor, scale: Tensor, shift: Tensor, sigmoid: bool = False, impl: str | None = None
) -> Tensor:
    """Normalise without parameters, then scale and shift by the conditioning.

    Args:
        a: [M, n, C].
        scale: [1 or M, n, C].
        shift: [1 or M, n, C].
        sigmoid: `scale` holds logits.
        impl: see `foldcp_kernels.core.dispatch`.

    Returns:
        [M, n, C] in the dtype that matrix products of `a` take, since projections follow.

    Raises:
        ValueError: a shape or dtype that does not fit, or a named `impl` cannot run.

    Source: AlphaFold 3 supplement, Algorithm 26.
    """
    check("adaptive_norm", a, scale, shift)
    name = choose("adaptive_norm", impl, a, _refusal(a, scale, shift))
    dtype = compute_dtype(a)
    if name == "reference":
        from foldcp_kernels.adaptive_norm import definition

        return definition.adaptive_norm(a, scale.sigmoid() if sigmoid else scale, shift).to(dtype)

    def twin(a: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        scale = scale.sigmoid() if sigmoid else scale
        return torch.addcmul(shift, F.layer_norm(a, a.shape[-1:], eps=EPS), scale).to(dtype)

    if name == "torch":
        return twin(a, scale, shift)
    from foldcp_kernels.adaptive_norm.fused import adaptive_norm_fwd

    def fused(a: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return adaptive_norm_fwd(a, scale, shift, dtype, sigmoid, EPS)

    return recompute(fused, twin, a, scale, shift)


def gated_residual(
    a: Tensor, gate: Tensor, x: Tensor, sigmoid: bool = False, impl: str | None = None
) -> Tensor:
    """Compute a + gate * x.

    Args:
        a: [M, n, C].
        x: [M, n, C].
        gate: [1 or M, n, C].
        sigmoid: `gate` holds logits.
        impl: see `foldcp_kernels.core.dispatch`.

    Returns:
        A new tensor [M, n, C] in the dtype of `a`.

    Raises:
        ValueError: a shape or dtype that does not fit, or a named `impl` cannot run.

    Source: AlphaFold 3 supplement, Algorithms 24 and 25.
    """
    check("gated_residual", a, gate, x)
    name = choose("gated_residual", impl, a, _refusal(a, gate, x))
    if name == "reference":
        from foldcp_kernels.adaptive_norm import definition

        return definition.gated_residual(a, gate.sigmoid() if sigmoid else gate, x)

    def twin(a: Tensor, gate: Tensor, x: Tensor) -> Tensor:
        return torch.addcmul(a, gate.sigmoid() if sigmoid else gate, x).to(a.dtype)

    if name == "torch":
        return twin(a, gate, x)
    from foldcp_kernels.adaptive_norm.fused import gated_residual_fwd

    def fused(a: Tensor, gate: Tensor, x: Tensor) -> Tensor:
        return gated_residual_fwd(a, gate, x, sigmoid)

    return recompute(fused, twin, a, gate, x)


def _refusal(a: Tensor, first: Tensor, second: Tensor) -> str | None:
    if a.shape[2] > MAX_CHANNELS:
        return f"`a` has {a.shape[2]} channels; expected at most {MAX_CHANNELS}"
    named = ((a, "a"), (first, "conditioning"), (second, "conditioning"))
    return next((r for x, name in named if (r := check_dtype(x, name))), None)
