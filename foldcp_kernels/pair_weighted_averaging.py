"""Pair-weighted averaging of an MSA: attention whose logits come from the pair tensor alone.

    p_ij = softmax_j(LN(z_ij) Wz + 1e6 (mask_ij - 1))
    m_si += (sigmoid(LN(m_si) Wg) * sum_j p_ij (LN(m_sj) Wv)) Wo

The weights serve all sequences, so they are made once and the average is a batched product.

Source: AlphaFold 3 supplement, Algorithm 10.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foldcp_kernels.arguments import check
from foldcp_kernels.chunking import chunk_length, map_chunks
from foldcp_kernels.gated_output import gated_output
from foldcp_kernels.norm_linear import choose_rows, norm_linear_planes, norm_linear_rows
from foldcp_kernels.recompute import nothing

MASKED = 1e6  # what Boltz takes from the logit of a masked pair


@dataclass(frozen=True)
class PairWeightedAveragingWeights:
    """Weights with H heads of D channels.

    norm_m_weight, norm_m_bias [C_m]; norm_z_weight, norm_z_bias [C_z]; m, g [H * D, C_m];
    z [H, C_z]; o [C_m, H * D].
    """

    norm_m_weight: Tensor
    norm_m_bias: Tensor
    norm_z_weight: Tensor
    norm_z_bias: Tensor
    m: Tensor
    g: Tensor
    z: Tensor
    o: Tensor
    heads: int

    def tensors(self) -> tuple[Tensor, ...]:
        """The weights in order."""
        return tuple(vars(self).values())[:-1]

    def logits(self, z: Tensor, impl: str | None = None) -> Tensor:
        """Weight logits of a tile: [B, T_r, T_c, C_z] -> [B, H, T_r, T_c]."""
        return norm_linear_planes(z, self.norm_z_weight, self.norm_z_bias, self.z, impl=impl)

    def values(self, m: Tensor, impl: str | None = None) -> Tensor:
        """Values of some sequences: [B, S, N, C_m] -> [B, S, N, H, D]."""
        v = norm_linear_rows(m, self.norm_m_weight, self.norm_m_bias, self.m, impl)
        return v.unflatten(-1, (self.heads, -1))

    def output(self, m: Tensor, o: Tensor, impl: str | None = None) -> Tensor:
        """m with its gated update; in place when gradients are off; o [B, S, N, H * D]."""
        return gated_output(m, self.norm_m_weight, self.norm_m_bias, self.g, o, self.o, impl)


def average(v: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of values.

    Args:
        v: [B, S, K, H, D]. weights: [B, H, I, K].

    Returns:
        [B, S, I, H, D].
    """
    s, d = v.shape[1], v.shape[4]
    # [B, H, I, K] @ [B, H, K, S*D] -> [B, H, I, S*D]
    o = weights.to(v.dtype) @ v.permute(0, 3, 2, 1, 4).flatten(3)
    return o.unflatten(3, (s, d)).permute(0, 3, 2, 1, 4)


def masked(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Logits [B, H, I, K] less `MASKED` where a mask [B, I, K] is 0, in float32 or wider."""
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
    """m + pair-weighted averaging of a whole MSA; in place when gradients are off.

    Args:
        m: MSA [B, S, N, C_m]. z: pair tensor [B, N, N, C_z]. w: weights. impl: see `dispatch`.
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
        from foldcp_kernels import reference

        v, logits = w.values(m, "torch"), masked(w.logits(z, "torch"), mask)
        return w.output(m, reference.pair_weighted_averaging(v, logits).flatten(-2), "torch")
    if impl == "triton":  # all of it must run before any of it does
        for x, name in ((m, "m"), (z, "z")):
            choose_rows("pair_weighted_averaging", impl, x, name, (x.shape[-1],))
    weights = torch.softmax(masked(w.logits(z, impl), mask), -1)
    each = 4 * m.shape[0] * m.shape[2] * w.m.shape[0] * m.element_size()

    def change(chunk: Tensor, _: tuple[int, int]) -> Tensor:
        o = average(w.values(chunk, impl), weights).flatten(-2)
        return w.output(chunk, o, impl)

    return map_chunks(m, 1, chunk_length(m.shape[1], each, m.device), change)
