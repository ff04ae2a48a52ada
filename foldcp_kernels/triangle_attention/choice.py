"""Choose what runs the parts of a triangle attention, and how many lines to take at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from foldcp_kernels.adaptive_norm import refusal as norm_refusal
from foldcp_kernels.attention import refusal as core_refusal
from foldcp_kernels.core.chunking import chunk_length
from foldcp_kernels.core.dispatch import choose, compute_dtype, named
from foldcp_kernels.norm_linear import PLANES, refusal, slower
from foldcp_kernels.triangle_attention.definition import TriangleAttentionWeights

_CHUNKS = 16  # of a launch each, which should fill a GPU
_TORCH_CHUNKS = 8  # each fetches its part of the bias again


@dataclass(frozen=True)
class Parts:
    """Runners of the parts of a triangle attention, chosen before any of them runs.

    Args:
        rows: what runs the projections to queries, keys and values, and the output.
        bias: what runs the projection to the bias.
        norm: what runs the LayerNorm of whole lines, which a mesh may project elsewhere.
        core: what runs the attention.
        cuequivariance: cuEquivariance runs the attention of lines whose keys come all at once.
    """

    rows: str
    bias: str
    norm: str
    core: str
    cuequivariance: bool = False


def chosen(z: Tensor, w: TriangleAttentionWeights) -> Parts:
    """Choose what runs each part, by the default implementation.

    Args:
        z: pair tile [B, T_r, T_c, C].
        w: weights.
    """
    return choose_parts(z, w, None)


def choose_parts(z: Tensor, w: TriangleAttentionWeights, impl: str | None) -> Parts:
    """Choose what runs each part of an op that was called with `impl`.

    Args:
        z: pair tile [B, T_r, T_c, C].
        w: weights.
        impl: what the caller names.

    Raises:
        ValueError: a named implementation cannot run one of them.
    """
    name = named(impl)
    if name == "torch" or impl == "cuequivariance":
        return Parts(*("torch",) * 4, name == "cuequivariance")
    c, d, gain, dtype = z.shape[-1], w.q.shape[0] // w.heads, w.norm_weight, compute_dtype(z)
    covers, prefers = partial(refusal, z, "z", (c,)), partial(slower, z)
    rows = choose("triangle_attention", impl, z, covers, prefers)
    bias = PLANES.choose(z, None, None, w.bias, None, None, impl=impl)
    core = choose("attention", impl, z, partial(core_refusal, d, dtype), dtype=dtype)
    covers = partial(norm_refusal, c, z.dtype, gain.dtype, w.norm_bias.dtype)
    norm = choose("adaptive_norm", impl, z, covers)
    return Parts(rows, bias, norm, core, name == "cuequivariance")


def lines_per_chunk(z: Tensor, dim: int, w: TriangleAttentionWeights, parts: Parts) -> int:
    """Return the number of lines of the pair tensor to take at a time.

    Args:
        z: [B, N, N, C].
        dim: of its lines.
        w: weights.
        parts: from `chosen`.

    Returns:
        Lines whose queries, keys, values and outputs exist at once.
    """
    fused = parts.rows == "triton"
    # torch: normed lines, q, k, v, logits of a part, o, gate; fused: q, k, v, o.
    width = 4 * compute_dtype(z).itemsize if fused else 10 * z.element_size()
    each = width * z.shape[0] * z.shape[3 - dim] * w.q.shape[0]
    most = _CHUNKS if fused else 0
    return chunk_length(z.shape[dim], each, z.device, at_most=most, uncut=fused)


def least_chunks(z: Tensor, dim: int, w: TriangleAttentionWeights, parts: Parts) -> int:
    """Return the least number of chunks of a mesh tile's lines: torch holds more of each at once.

    Args:
        z: pair tile [B, T_r, T_c, C].
        dim: of its lines.
        w: weights.
        parts: from `chosen`.
    """
    if parts.rows == "triton":
        return 1
    return min(_TORCH_CHUNKS, -(-z.shape[dim] // lines_per_chunk(z, dim, w, parts)))
