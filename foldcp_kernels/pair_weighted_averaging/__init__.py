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
from foldcp_kernels.pair_weighted_averaging import definition
from foldcp_kernels.pair_weighted_averaging.definition import (
    PairWeightedAveragingWeights as PairWeightedAveragingWeights,
)
from foldcp_kernels.pair_weighted_averaging.parts import (
    average,
    choose_parts,
    logits,
    masked,
    output,
    values,
)


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
        full = z.new_ones(z.shape[:3]) if mask is None else mask
        return definition.pair_weighted_averaging(m, z, full, w)
    parts = choose_parts(m, z, w, impl)
    weights = torch.softmax(masked(logits(z, w, parts), mask), -1)
    each = 4 * m.shape[0] * m.shape[2] * w.m.shape[0] * m.element_size()

    def change(chunk: Tensor, _: tuple[int, int]) -> Tensor:
        o = average(values(chunk, w, parts), weights).flatten(-2)
        return output(chunk, o, w, parts)

    return map_chunks(m, 1, chunk_length(m.shape[1], each, m.device), change)
