"""Attention of a set of queries to a set of keys with an additive bias, mergeable over key sets.

    o_i = sum_k p_ik v_k,  p_ik = exp(q_i . k_k * scale + bias_ik - lse_i),
    lse_i = log sum_k exp(q_i . k_k * scale + bias_ik)

Two results over disjoint key sets merge into the result over their union (`merge`), which is
what rings and row groups do. Source: FlashAttention (Dao et al. 2022), Algorithm 1; AlphaFold 3
supplement, Algorithms 14, 15 and 24.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foldcp_kernels.chunking import chunk_length, spans

Carry = tuple[Tensor, Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Carry:
    """Attention over one set of keys.

    Args:
        q: queries [G, H, I, D].
        k: keys [G, H, K, D], K >= 1.
        v: values [G, H, K, D].
        bias: additive logits, broadcastable to [G, H, I, K] (4 dims); masks are part of it.
        scale: factor on q . k.

    Returns:
        (o, lse): [G, H, I, D] in the dtype of q, and [G, H, I] in float32 (float64 for float64).

    Raises:
        ValueError: a tensor has the wrong number of dimensions, or there is no key.

    Source: FlashAttention, Algorithm 1.
    """
    for name, x in (("q", q), ("k", k), ("v", v), ("bias", bias)):
        if x.ndim != 4:
            raise ValueError(f"`{name}` must have 4 dimensions [G, H, rows, D or K], got {x.ndim}")
    if k.shape[2] == 0:
        raise ValueError("`k` has no keys: leave an empty key set out instead")
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


def _explicit(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Carry:
    with torch.autocast(q.device.type, enabled=False):
        logits = (q @ k.transpose(-1, -2)).to(
            torch.float64 if q.dtype == torch.float64 else torch.float32
        )
        logits = logits * scale + bias
        lse = logits.logsumexp(-1)
        p = (logits - lse[..., None]).exp().to(v.dtype)
        return p @ v, lse


def merge(carry: Carry | None, new: Carry) -> Carry:
    """Combine the attention results of two disjoint key sets.

    Args:
        carry: (o, lse) so far, None at the start. new: (o, lse) of more keys.

    Returns:
        (o, lse) over the union; `o` in float32 or wider.

    Source: FlashAttention, section 3.1 (online softmax).
    """
    if carry is None:
        return new
    (o, lse), (o2, lse2) = carry, new
    total = torch.logaddexp(lse, lse2)
    w = (lse - total).exp()[..., None]
    w2 = (lse2 - total).exp()[..., None]
    return o * w + o2 * w2, total


def merge_all(o: Tensor, lse: Tensor) -> Tensor:
    """Combine Q partial results stacked along dim 0.

    Args:
        o: [Q, ..., D]. lse: [Q, ...]; -inf marks a partial without keys.

    Returns:
        [..., D].
    """
    return (o * lse.softmax(0)[..., None].to(o.dtype)).sum(0)
