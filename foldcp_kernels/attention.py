"""Attention of a set of queries to a set of keys with an additive bias, mergeable over key sets.

    o_i = sum_k p_ik v_k,  p_ik = exp(q_i . k_k * scale + bias_ik - lse_i),
    lse_i = log sum_k exp(q_i . k_k * scale + bias_ik)

Results over disjoint key sets merge into the result over their union (`carry.merge`), which is
what rings and row groups do. Source: FlashAttention (Dao et al. 2022), Algorithm 1; AlphaFold 3
supplement, Algorithms 14, 15 and 24.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from foldcp_kernels.arguments import check
from foldcp_kernels.carry import Carry, merge
from foldcp_kernels.chunking import chunk_length, spans
from foldcp_kernels.dispatch import check_dtype, choose
from foldcp_kernels.recompute import nothing

MAX_HEAD_DIM = 64


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    keep: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over one set of keys, differentiable.

    Args:
        q: queries [G, H, I, D], or [G0, G1, H, I, D] where the G1 rows of one G0 share a bias.
        k, v: keys and values [.., H, K, D], K >= 1.
        bias: additive logits [G or 1, H, I or 1, K], or [G0 or 1, 1, H, I or 1, K]; None is 0.
        scale: factor on q . k.
        keep: keys, bool [G, K] or [G0, G1, K], True = keep; None keeps all. A row that keeps none
            attends to all its keys, which is what a large negative logit on each of them comes to.
        impl: see `dispatch`.

    Returns:
        (o, lse): like q, and [.., H, I] in float32 (float64 for float64).

    Raises:
        ValueError: a shape or dtype that does not fit, no key, or a named `impl` that cannot run.

    Source: FlashAttention, Algorithm 1.
    """
    name = _checked(q, k, v, bias, keep, impl)
    if not q.numel():
        lse = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
        return tuple(nothing(x, q, k, v, bias) for x in (q, lse))
    if keep is not None:
        keep = keep | ~keep.any(-1, keepdim=True)
    q, k, v, bias, keep, restore = _rows_of_bias(q, k, v, bias, keep)
    if name == "triton":
        from foldcp_kernels.fused.attention_backward import Attention

        o, lse = Attention.apply(*_unit_stride(q, k, v), bias, scale, keep)
    elif name == "reference":
        from foldcp_kernels import reference

        o, lse = reference.attention(q, k, v, bias, scale, keep)
    else:
        o, lse = _torch(q, k, v, bias, scale, keep)
    return restore(o), restore(lse)


def attend_panel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    scale: float,
    carry: Carry | None,
    last: bool,
    impl: str | None = None,
) -> Carry:
    """Attention over one panel of keys, carried on from the panels before.

    Args:
        q, k, v, bias, scale, impl: as in `attend`, [G0, G1, H, .., D].
        carry: from the panel before, None at the first; it may be changed in place.
        last: there is no further panel: the result may come finished (`Carry.finish`).

    Returns:
        The carry over all panels so far.

    Raises:
        ValueError: as `attend`.

    Source: FlashAttention, section 3.1.
    """
    name = _checked(q, k, v, bias, None, impl)
    graph = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, bias))
    if name == "triton" and not graph and q.numel():
        from foldcp_kernels.fused.attention import attention_fwd

        bias = _expanded(bias, q)
        return attention_fwd(*_unit_stride(q, k, v), bias, scale, carry=carry, last=last)
    return merge(carry, Carry(*attend(q, k, v, bias, scale, impl=impl), None))


def _checked(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, keep: Tensor | None, impl: str | None
) -> str:
    """Validate and choose the implementation."""
    if q.ndim not in (4, 5):
        raise ValueError(f"`q` has {q.ndim} dimensions; expected 4 [G, H, I, D] or 5")
    check("attention 5" if q.ndim == 5 else "attention 4", q, k, v, bias, keep)
    if k.shape[-2] == 0 and q.numel():
        raise ValueError("`k` has no keys: leave an empty key set out instead")
    reason = None if bias is None else check_dtype(bias, "bias")
    return choose_core(impl, q, q.shape[-1], reason)


def choose_core(impl: str | None, x: Tensor, d: int, reason: str | None = None) -> str:
    """`dispatch.choose` for attention with heads of `d` channels; `reason`: against the kernel."""
    if d > MAX_HEAD_DIM:
        reason = f"`q` has head dim {d}; expected at most {MAX_HEAD_DIM}"
    return choose("attention", impl, x, reason or check_dtype(x, "q"))


def _rows_of_bias(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Callable[[Tensor], Tensor]]:
    """Five-dimensional views, the bias expanded to [G0, 1, H, I, K], and the way back."""
    if q.ndim == 5:
        return q, k, v, _expanded(bias, q), keep, lambda x: x
    at = 0 if bias is None or bias.shape[0] == 1 else 1
    q, k, v = (x.unsqueeze(at) for x in (q, k, v))
    bias = None if bias is None else _expanded(bias.unsqueeze(1), q)
    keep = None if keep is None else keep.unsqueeze(at)
    return q, k, v, bias, keep, lambda x: x.squeeze(at)


def _expanded(bias: Tensor | None, q: Tensor) -> Tensor | None:
    if bias is None:
        return None
    return bias.expand(q.shape[0], -1, -1, q.shape[3], -1)


def _unit_stride(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _torch(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One batched attention per G0, or per G1 where there are fewer: no bias is copied."""
    g0, g1 = q.shape[:2]
    dropped = None
    if keep is not None:
        dropped = torch.zeros_like(keep, dtype=q.dtype).masked_fill(~keep, -torch.inf)
        dropped = dropped[:, :, None, None]
    if bias is None:
        bias = q.new_zeros((1, 1, 1, 1, 1)).expand(g0, 1, q.shape[2], 1, k.shape[3])
    parts = []
    dim = 0 if g0 <= g1 else 1
    for n in range(min(g0, g1)):
        take = (n,) if dim == 0 else (slice(None), n)
        b = bias[n] if dim == 0 else bias[:, 0]
        if dropped is not None:
            b = b + dropped[take]
        parts.append(_attend(q[take], k[take], v[take], b, scale))
    if len(parts) == 1:
        return tuple(x.unsqueeze(dim) for x in parts[0])
    return tuple(torch.stack(x, dim) for x in zip(*parts, strict=True))


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q [G, H, I, D], k, v [G, H, K, D], bias broadcastable to [G, H, I, K]."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, bias)):
        return _explicit(q, k, v, bias, scale)
    if q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=bias.to(q.dtype), scale=scale
        )
    g, h, i, _ = q.shape
    out = q.new_empty(q.shape)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty((g, h, i), dtype=wide)
    row = 12 * h * k.shape[2]  # bytes of the logits and weights of one query row
    groups, rows = chunk_length(g, row * i, q.device), chunk_length(i, row, q.device)
    for a, b in spans(g, groups):
        shared = bias if bias.shape[0] == 1 else bias[a:b]
        for lo, hi in spans(i, rows if groups == 1 else i):
            part = shared if shared.shape[2] == 1 else shared[:, :, lo:hi]
            out[a:b, :, lo:hi], lse[a:b, :, lo:hi] = _explicit(
                q[a:b, :, lo:hi], k[a:b], v[a:b], part, scale
            )
    return out, lse


def _explicit(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        logits = (q @ k.transpose(-1, -2)).to(
            torch.float64 if q.dtype == torch.float64 else torch.float32
        )
        logits = logits * scale + bias
        lse = logits.logsumexp(-1)
        p = (logits - lse[..., None]).exp().to(v.dtype)
        return p @ v, lse
