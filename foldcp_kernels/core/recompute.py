"""Gradients of fused forwards: the backward differentiates the torch twin, computed again.

The fused forward keeps none of its intermediates; its twin runs in the backward on the inputs, as
in gradient checkpointing. Attention has backward kernels of its own and does not come here.

Source: Chen et al. 2016 (arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


class _Once(torch.autograd.Function):
    """Gradients that have no derivative, tied to all that they depend on."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        raise RuntimeError(
            "foldcp's ops have no second derivative: differentiate once, or use the modules of "
            "stock Boltz where gradients are differentiated again"
        )


def once(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Refuse to differentiate a backward, whichever way its gradients are differentiated again.

    `once_differentiable` of torch stays silent where `torch.autograd.grad` asks for some inputs.

    Args:
        backward: of an `autograd.Function`.
    """

    @wraps(backward)
    def run(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        made = [x for x in found if x is not None]
        above = [x for x in (*ctx.saved_tensors, *grads) if x is not None and x.requires_grad]
        tied = iter(_Once.apply(len(made), *made, *above))
        return tuple(None if x is None else next(tied) for x in found)

    return run


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, fused: Callable[..., Tensor], twin: Callable[..., Tensor], *tensors: Tensor | None
    ) -> Tensor:
        ctx.twin = twin
        device = next(x for x in tensors if x is not None).device.type
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        ctx.autocast = {"device_type": device, "dtype": dtype, "enabled": enabled}
        ctx.save_for_backward(*tensors)
        return fused(*tensors)

    @staticmethod
    @once
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[2:]
        leaves = [
            x.detach().requires_grad_(need) if x is not None else None
            for x, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            out = ctx.twin(*leaves)
        wanted = [x for x, need in zip(leaves, needed, strict=True) if need]
        grads = iter(torch.autograd.grad(out, wanted, dout.to(out.dtype), allow_unused=True))
        return None, None, *(next(grads) if need else None for need in needed)


def nothing(out: Tensor, *inputs: Tensor | None) -> Tensor:
    """Return the result of an op without elements: the gradients of its inputs are zeros.

    Args:
        out: an empty tensor.
        inputs: of the op.

    Returns:
        `out` itself when gradients are off, else a new tensor.
    """
    if not torch.is_grad_enabled():
        return out
    return sum((x.sum() for x in inputs if x is not None and x.requires_grad), out + 0)


def recompute(
    fused: Callable[..., Tensor], twin: Callable[..., Tensor], *tensors: Tensor | None
) -> Tensor:
    """Call `fused(*tensors)`, differentiable through `twin`.

    Args:
        fused: the forward; it runs without gradients and must not change its inputs.
        twin: a differentiable function of the same tensors with the same result.
        tensors: floating-point tensors or None.

    Returns:
        The result of `fused`.
    """
    if not torch.is_grad_enabled():
        return fused(*tensors)
    if any(x is not None and x.requires_grad for x in tensors):
        return _Recompute.apply(fused, twin, *tensors)
    with torch.no_grad():
        return fused(*tensors)
