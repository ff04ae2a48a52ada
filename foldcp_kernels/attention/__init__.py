"""Attention of a set of queries to a set of keys with an additive bias, mergeable over key sets.

    o_i = sum_k p_ik v_k,  p_ik = exp(q_i . k_k * scale + bias_ik - lse_i),
    lse_i = log sum_k exp(q_i . k_k * scale + bias_ik)

Biases may be any finite number, on some keys or on all of a row: they are taken relative to the
largest of their row first. Where that is beyond 2^53, q . k is below the spacing of float64 beside
it and left out.

Results over disjoint key sets merge into the result over their union (`carry.merge`), which is
what rings and row groups do. Source: FlashAttention (Dao et al. 2022), Algorithm 1; AlphaFold 3
supplement, Algorithms 14, 15 and 24.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foldcp_kernels.attention import definition
from foldcp_kernels.attention.carry import Carry, merge
from foldcp_kernels.attention.weighted import unit_stride, weighted
from foldcp_kernels.core.arguments import check
from foldcp_kernels.core.dispatch import refused
from foldcp_kernels.core.op import Op
from foldcp_kernels.core.recompute import nothing

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
    """Attend to one set of keys, differentiably.

    Args:
        q: queries [G, H, I, D], or [G0, G1, H, I, D] where the G1 rows of one G0 share a bias.
        k: keys [.., H, K, D], K >= 1.
        v: values, shaped like the keys.
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
    _check(q, k, v, bias, keep)
    chosen = _ATTENTION.choose(q, k, v, bias, keep, impl=impl)
    return attend_some(chosen, q, k, v, bias, scale, keep).finish()


def choose_core(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> str:
    """Choose what runs `attend_some` and `attend_next`.

    Args:
        q: as in `attend`.
        k: as in `attend`.
        v: as in `attend`.
        bias: as in `attend`.
    """
    return _ATTENTION.choose(q, k, v, bias)


def attend_some(
    chosen: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    keep: Tensor | None = None,
) -> Carry:
    """Attend to one of several sets of keys; the results of all are merged later.

    Args:
        chosen: what runs it.
        q: as in `attend`.
        k: as in `attend`.
        v: as in `attend`.
        bias: as in `attend`.
        scale: as in `attend`.
        keep: as in `attend`.

    Returns:
        The carry, with l None: o is the result over these keys.

    Source: FlashAttention, section 3.1.
    """
    if not q.numel():
        r = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
        return Carry(nothing(q, q, k, v, bias), r, nothing(r, q, k, v, bias), None)
    if keep is not None:
        keep = keep | ~keep.any(-1, keepdim=True)
    q, k, v, bias, keep, restore = _rows_of_bias(q, k, v, bias, keep)
    o, r, m = _ATTENTION.run(chosen, q, k, v, bias, keep, scale=scale)
    return Carry(restore(o), restore(r), restore(m), None)


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
    """Attend to one panel of keys, carried on from the panels before.

    Args:
        q: as in `attend`, [G0, G1, H, I, D].
        k: as in `attend`, [G0, G1, H, K, D].
        v: as in `attend`, [G0, G1, H, K, D].
        bias: as in `attend`.
        scale: as in `attend`.
        carry: from the panel before, None at the first; it may be changed in place.
        last: there is no further panel: the result may come finished (`Carry.finish`).
        impl: as in `attend`.

    Returns:
        The carry over all panels so far.

    Raises:
        ValueError: as `attend`.

    Source: FlashAttention, section 3.1.
    """
    _check(q, k, v, bias, None)
    chosen = _ATTENTION.choose(q, k, v, bias, None, impl=impl)
    return attend_next(chosen, q, k, v, bias, scale, carry, last)


def attend_next(
    chosen: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    scale: float,
    carry: Carry | None,
    last: bool,
) -> Carry:
    """See `attend_panel`: `chosen` runs it, on arguments that were checked."""
    graph = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, bias))
    if chosen == "triton" and not graph and q.numel():
        from foldcp_kernels.attention.fused import attention_fwd

        bias = _expanded(bias, q)
        return attention_fwd(*unit_stride(q, k, v), bias, scale, carry=carry, last=last)
    return merge(carry, attend_some(chosen, q, k, v, bias, scale))


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, keep: Tensor | None) -> None:
    if q.ndim not in (4, 5):
        raise ValueError(f"`q` has {q.ndim} dimensions; expected 4 [G, H, I, D] or 5")
    check("attention 5" if q.ndim == 5 else "attention 4", q, k, v, bias, keep)
    if k.shape[-2] == 0 and q.numel():
        raise ValueError("`k` has no keys: leave an empty key set out instead")


def refusal(d: int, dtype: torch.dtype) -> str | None:
    """Return the reason why the kernels cannot take an attention, None where they can.

    Args:
        d: channels of a head.
        dtype: of the queries, keys and values.
    """
    if d > MAX_HEAD_DIM:
        return f"`q` has head dim {d}; expected at most {MAX_HEAD_DIM}"
    return refused(dtype, "q")


def _refusal(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *_: Any) -> str | None:
    reason = refusal(q.shape[-1], q.dtype)
    return reason if bias is None or reason else refused(bias.dtype, "bias")


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


def _eager(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, keep: Tensor | None, scale: float
) -> tuple[Tensor, ...]:
    """One batched attention per G0, or per G1 where there are fewer: (o, r, m)."""
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
        parts.append(weighted(q[take], k[take], v[take], b, scale))
    if len(parts) == 1:
        return tuple(x.unsqueeze(dim) for x in parts[0])
    return tuple(torch.stack(x, dim) for x in zip(*parts, strict=True))


def _defined(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, keep: Tensor | None, scale: float
) -> tuple[Tensor, ...]:
    o, lse = definition.attention(q, k, v, bias, scale, keep)
    return o, torch.zeros_like(lse), lse


def _fused() -> Callable[..., tuple[Tensor, ...]]:
    from foldcp_kernels.attention.fused_backward import Attention

    def run(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, keep: Tensor | None, scale: float
    ) -> tuple[Tensor, ...]:
        return Attention.apply(*unit_stride(q, k, v), bias, scale, keep)

    return run


_ATTENTION = Op(
    "attention",
    eager=_eager,
    triton=_fused,
    covers=_refusal,
    definition=_defined,
    own_backward=True,
)
