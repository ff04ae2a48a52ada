"""Pair-weighted averaging of an MSA: attention whose logits come from the pair tensor alone.

    p_ij = softmax_j(LN(z_ij) Wz + 1e6 (mask_ij - 1))
    m_si += (sigmoid(LN(m_si) Wg) * sum_j p_ij (LN(m_sj) Wv)) Wo

The weights serve all sequences, so they are made once and the average is a batched product.

Source: AlphaFold 3 supplement, Algorithm 10.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foldcp_kernels.core.arguments import check
from foldcp_kernels.core.chunking import chunk_length, map_chunks
from foldcp_kernels.core.recompute import nothing
from foldcp_kernels.norm_linear import choose_rows
from foldcp_kernels.pair_weighted_averaging.weights import MASKED, PairWeightedAveragingWeights


def average(v: Tensor, weights: Tensor) -> Tensor:
    """Compute weighted sums of values.

    Args:
        v: [B, S, K, H, D].
        weights: [B, H, I, K].

    Returns:
        [B, S, I, H, D].
    """
    s, d = v.shape[1], v.shape[4]
    # [B, H, I, K] @ [B, H, K, S*D] -> [B, H, I, S*D]
    o = weights.to(v.dtype) @ v.permute(0, 3, 2, 1, 4).flatten(3)
    return o.unflatten(3, (s, d)).permute(0, 3, 2, 1, 4)


def masked(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Lower logits by `MASKED` where the mask is 0, in float32 or wider.

    Args:
        logits: [B, H, I, K].
        mask: [B, I, K], 1 = keep; None keeps all.
    """
    if mask is None:
        return logits
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits + ((mask.to(wide) - 1) * MASKED)[:, None]


def pair_weighted_averaging(
    m: Tensor,
    z: Tensor,
    w: PairWeightedAveragingWeights,
    impl: str | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute m + pair-weighted averaging of a whole MSA; in place when gradients are off.

    Args:
        m: MSA [B, S, N, C_m].
        z: pair tensor [B, N, N, C_z].
        w: weights.
        impl: see `dispatch`.
        mask: pairs that count [B, N, N], 1 = keep, None keeps all.

    Returns:
        [B, S, N, C_m], `m` itself when gradients are off.

    Raises:
        ValueError: a shape or dtype that does not fit, or a named `impl` that cannot run.

    Source: AlphaFold 3 supplement, Algorithm 10.
    """
    check("pair_weighted_averaging", m, z, mask, *w.tensors(), H=w.heads)
    if not m.numel():
        return nothing(m, z, *w.tensors())
    if impl == "reference":
        from foldcp_kernels.pair_weighted_averaging import definition

        v, logits = w.values(m, "torch"), masked(w.logits(z, "torch"), mask)
        return w.output(m, definition.pair_weighted_averaging(v, logits).flatten(-2), "torch")
    if impl == "triton":  # all of it must run before any of it does
        for x, name in ((m, "m"), (z, "z")):
            choose_rows("pair_weighted_averaging", impl, x, name, (x.shape[-1],))
    weights = torch.softmax(masked(w.logits(z, impl), mask), -1)
    each = 4 * m.shape[0] * m.shape[2] * w.m.shape[0] * m.element_size()

    def change(chunk: Tensor, _: tuple[int, int]) -> Tensor:
        o = average(w.values(chunk, impl), weights).flatten(-2)
        return w.output(chunk, o, impl)

    return map_chunks(m, 1, chunk_length(m.shape[1], each, m.device), change)
