"""Conditioned LayerNorm and gated residual of the diffusion transformers.

    adaptive_norm = LN(a) * f(scale) + shift,    gated_residual = a + f(gate) * x

f is the sigmoid where `sigmoid` is set. Conditioning that serves many steps (atoms) is passed with
its sigmoid taken; what serves one call (tokens) is passed as logits, which saves passes on a GPU.

Source: AlphaFold 3 supplement, Algorithms 24 and 25 (gates) and 26.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from foldcp_kernels.adaptive_norm import definition
from foldcp_kernels.core.dispatch import KERNEL_DTYPES, compute_dtype, refused
from foldcp_kernels.core.op import Op

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
    return ADAPTIVE_NORM(a, scale, shift, impl=impl, sigmoid=sigmoid)


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
    return _GATED_RESIDUAL(a, gate, x, impl=impl, sigmoid=sigmoid)


def refusal(channels: int, *dtypes: torch.dtype) -> str | None:
    """Return the reason why the kernels cannot take these arguments, None where they can.

    Args:
        channels: C.
        dtypes: of `a` and of the others.
    """
    if channels > MAX_CHANNELS:
        return f"`a` has {channels} channels; expected at most {MAX_CHANNELS}"
    for i, dtype in enumerate(dtypes):
        if dtype not in KERNEL_DTYPES:
            return refused(dtype, "conditioning" if i else "a")
    return None


def _norm(a: Tensor, scale: Tensor, shift: Tensor, sigmoid: bool) -> Tensor:
    scale = scale.sigmoid() if sigmoid else scale
    out = torch.addcmul(shift, F.layer_norm(a, a.shape[-1:], eps=EPS), scale)
    return out.to(compute_dtype(a))


def _defined_norm(a: Tensor, scale: Tensor, shift: Tensor, sigmoid: bool) -> Tensor:
    scale = scale.sigmoid() if sigmoid else scale
    return definition.adaptive_norm(a, scale, shift).to(compute_dtype(a))


def _fused_norm() -> Callable[..., Tensor]:
    from foldcp_kernels.adaptive_norm.fused import adaptive_norm

    return adaptive_norm


def _residual(a: Tensor, gate: Tensor, x: Tensor, sigmoid: bool) -> Tensor:
    return torch.addcmul(a, gate.sigmoid() if sigmoid else gate, x).to(a.dtype)


def _defined_residual(a: Tensor, gate: Tensor, x: Tensor, sigmoid: bool) -> Tensor:
    return definition.gated_residual(a, gate.sigmoid() if sigmoid else gate, x)


def _fused_residual() -> Callable[..., Tensor]:
    from foldcp_kernels.adaptive_norm.fused import gated_residual_fwd

    return gated_residual_fwd


ADAPTIVE_NORM = Op(
    "adaptive_norm",
    eager=_norm,
    triton=_fused_norm,
    covers=lambda a, first, other: refusal(a.shape[2], a.dtype, first.dtype, other.dtype),
    definition=_defined_norm,
    empty=lambda a, *_: a.new_empty(a.shape, dtype=compute_dtype(a)),
)
_GATED_RESIDUAL = Op(
    "gated_residual",
    eager=_residual,
    triton=_fused_residual,
    covers=lambda a, first, other: refusal(a.shape[2], a.dtype, first.dtype, other.dtype),
    definition=_defined_residual,
    empty=lambda a, *_: torch.empty_like(a),
)
