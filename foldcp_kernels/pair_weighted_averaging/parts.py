"""The parts of a pair weighted averaging that a mesh runs: logits and values in, output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foldcp_kernels.gated_output import GATED_OUTPUT
from foldcp_kernels.norm_linear import PLANES, ROWS
from foldcp_kernels.pair_weighted_averaging.definition import (
    MASKED,
    PairWeightedAveragingWeights,
)


@dataclass(frozen=True)
class Parts:
    """Runners of the parts of a pair weighted averaging, chosen before any of them runs."""

    logits: str
    values: str
    output: str


def chosen(m: Tensor, z: Tensor, w: PairWeightedAveragingWeights) -> Parts:
    """Choose what runs each part, by the default implementation.

    Args:
        m: MSA [B, S, N, C_m].
        z: pair tile [B, T_r, T_c, C_z].
        w: weights.
    """
    return choose_parts(m, z, w, None)


def choose_parts(m: Tensor, z: Tensor, w: PairWeightedAveragingWeights, impl: str | None) -> Parts:
    """Choose what runs each part of an op that was called with `impl`.

    Args:
        m: MSA [B, S, N, C_m].
        z: pair tile [B, T_r, T_c, C_z].
        w: weights.
        impl: what the caller names.

    Raises:
        ValueError: a named implementation cannot run one of them.
    """
    logits = PLANES.choose(z, None, None, w.z, None, None, impl=impl)
    values = ROWS.choose(m, None, None, w.m, impl=impl)
    return Parts(logits, values, GATED_OUTPUT.choose(m, impl=impl))


def logits(z: Tensor, w: PairWeightedAveragingWeights, parts: Parts) -> Tensor:
    """Project a tile to weight logits: [B, T_r, T_c, C_z] -> [B, H, T_r, T_c].

    Args:
        z: pair tile [B, T_r, T_c, C_z].
        w: weights.
        parts: from `chosen`.
    """
    norm = w.norm_z_weight, w.norm_z_bias
    return PLANES.run(parts.logits, z, *norm, w.z, None, None)


def values(m: Tensor, w: PairWeightedAveragingWeights, parts: Parts) -> Tensor:
    """Project some sequences to values: [B, S, N, C_m] -> [B, S, N, H, D].

    Args:
        m: MSA [B, S, N, C_m].
        w: weights.
        parts: from `chosen`.
    """
    v = ROWS.run(parts.values, m, w.norm_m_weight, w.norm_m_bias, w.m)
    return v.unflatten(-1, (w.heads, -1))


def output(m: Tensor, o: Tensor, w: PairWeightedAveragingWeights, parts: Parts) -> Tensor:
    """Add the gated update to m; in place when gradients are off.

    Args:
        m: MSA [B, S, N, C_m].
        o: averages [B, S, N, H * D].
        w: weights.
        parts: from `chosen`.
    """
    return GATED_OUTPUT.run(parts.output, m, w.norm_m_weight, w.norm_m_bias, w.g, o, w.o)


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
