"""The local parts of triangle attention: projections of a chunk of lines, attention, output.

For a line i (a row for the starting node, a column for the ending node):
    o_ij = sum_k softmax_k(q_ij . k_ik / sqrt(D) + b_jk + 1e9 (mask_ik - 1)) v_ik
    z_ij += (sigmoid(LN(z_ij) Wg) * o_ij) Wo

Source: AlphaFold 2 supplement, Algorithms 13 and 14; AlphaFold 3 supplement, Algorithms 14 and 15.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foldcp_kernels.attention import attend_panel, attend_some, choose_core
from foldcp_kernels.attention.carry import Carry, merge
from foldcp_kernels.core.arguments import check
from foldcp_kernels.core.chunking import chunk_length
from foldcp_kernels.core.dispatch import choose, compute_dtype
from foldcp_kernels.core.recompute import nothing
from foldcp_kernels.gated_output import gated_output
from foldcp_kernels.norm_linear import choose_rows
from foldcp_kernels.triangle_attention.definition import MASKED, TriangleAttentionWeights
from foldcp_kernels.triangle_attention.lines import Lines, project_bias, project_lines

_CHUNKS = 16  # of a launch each, which should fill a GPU
_TORCH_CHUNKS = 8  # each fetches its part of the bias again


def lines_per_chunk(z: Tensor, dim: int, w: TriangleAttentionWeights) -> int:
    """Return the number of lines of the pair tensor to take at a time.

    Args:
        z: [B, N, N, C].
        dim: of its lines.
        w: weights.

    Returns:
        Lines whose queries, keys, values and outputs exist at once.
    """
    fused = choose_rows("triangle_attention", None, z, "z", (z.shape[-1],)) == "triton"
    # torch: normed lines, q, k, v, logits of a part, o, gate; fused: q, k, v, o.
    width = 4 * compute_dtype(z).itemsize if fused else 10 * z.element_size()
    each = width * z.shape[0] * z.shape[3 - dim] * w.q.shape[0]
    most = _CHUNKS if fused else 0
    return chunk_length(z.shape[dim], each, z.device, at_most=most, uncut=fused)


def least_chunks(z: Tensor, dim: int, w: TriangleAttentionWeights) -> int:
    """Return the least number of chunks of a mesh tile's lines: torch holds more of each at once.

    Args:
        z: pair tile [B, T_r, T_c, C].
        dim: of its lines.
        w: weights.
    """
    if choose_rows("triangle_attention", None, z, "z", (z.shape[-1],)) == "triton":
        return 1
    return min(_TORCH_CHUNKS, -(-z.shape[dim] // lines_per_chunk(z, dim, w)))


def attend_lines(
    lines: Lines,
    kv: Tensor,
    bias: Tensor,
    keep: Tensor | None,
    carry: Carry | None,
    last: bool,
    impl: str | None = None,
) -> Carry:
    """Attend all positions of the lines to one panel of keys.

    Args:
        lines: from `project_lines`.
        kv: of the panel [B, I, K, 2HD].
        bias: [B, H, J, K].
        keep: mask of the panel's keys [B, I, K], from `kept`; None keeps all.
        carry: over the panels so far (o [B, I, H, J, D]), None at the first panel.
        last: there is no further panel.
        impl: see `dispatch`; cuEquivariance takes all keys only.

    Returns:
        The new carry; from cuEquivariance without lse.
    """
    if keep is not None:
        lost = MASKED * (1 - keep.to(torch.promote_types(lines.q.dtype, torch.float32)))
        least = lost.amin(-1)
        # A key that loses more than the best of its panel has no weight beside it. The panel
        # counts by what its best loses: not at all, unless that is so in every panel.
        keep = lost == least[..., None]
    h, d = lines.q.shape[3:]
    hd = h * d
    q = lines.q.transpose(2, 3)
    k, v = (x.unflatten(-1, (h, d)).transpose(2, 3) for x in (kv[..., :hd], kv[..., hd:]))
    alone = carry is None and last
    if alone and choose("triangle_attention", impl, q, peer=True) == "cuequivariance":
        from foldcp_kernels.core.cuequivariance import attention

        o = attention(q, k, v, bias[:, None], lines.scale, keep)
        return Carry(o, *o.new_zeros((2, 1)), None)
    if keep is None:
        return attend_panel(q, k, v, bias[:, None], lines.scale, carry, last, impl)
    new = attend_some(q, k, v, bias[:, None], lines.scale, keep, impl)
    return merge(carry, new.lowered(least[..., None, None].to(new.r.dtype)))


def line_output(
    x: Tensor,
    carry: Carry,
    w: TriangleAttentionWeights,
    impl: str | None = None,
) -> Tensor:
    """Return the lines of z with the update that carried attention makes, see `updated_lines`.

    Args:
        x: lines of z [B, I, J, C], any strides.
        carry: over all keys.
        w: weights.
        impl: see `dispatch`.

    Returns:
        [B, I, J, C].
    """
    return updated_lines(x, attended(carry), w, impl)


def attended(carry: Carry) -> Tensor:
    """Finish attention over all keys: [B, I, J, HD]."""
    return carry.finish()[0].transpose(2, 3).flatten(-2)


def updated_lines(
    x: Tensor, o: Tensor, w: TriangleAttentionWeights, impl: str | None = None
) -> Tensor:
    """Add the update to lines of z; in place when gradients are off.

    Args:
        x: lines of z [B, I, J, C], any strides.
        o: from `attended`.
        w: weights.
        impl: see `dispatch`.

    Returns:
        [B, I, J, C].
    """
    return gated_output(x, w.norm_weight, w.norm_bias, w.g, o, w.o, impl)


def key_mask(mask: Tensor | None) -> Tensor | None:
    """Convert a key mask to the dtype that travels and `attend_lines` takes: bool or float32."""
    return mask if mask is None or mask.dtype == torch.bool else mask.float()


def triangle_attention(
    z: Tensor,
    mask: Tensor | None,
    w: TriangleAttentionWeights,
    starting: bool,
    impl: str | None = None,
) -> Tensor:
    """Compute z + triangle attention of a whole pair tensor; in place when gradients are off.

    Args:
        z: [B, N, N, C].
        w: weights.
        starting: Algorithm 14 (True) or 15 (False).
        mask: keys [B, N, N], bool or any number from 0 to 1, None keeps all. A key's logit loses
            1e9 (1 - mask), as in Boltz: the keys of a line with its largest mask are weighed by
            their logits, all others not at all; so are all keys of a line that keeps none.
        impl: see `dispatch`.

    Returns:
        [B, N, N, C], `z` itself when gradients are off.

    Raises:
        ValueError: a shape or dtype that does not fit, or a named `impl` that cannot run.

    Source: AlphaFold 3 supplement, Algorithms 14 and 15.
    """
    check("triangle_attention", z, mask, *w.tensors(), H=w.heads)
    if not z.numel():
        return nothing(z, *w.tensors())
    if impl == "reference":
        from foldcp_kernels.triangle_attention import definition

        full = z.new_ones(z.shape[:3]) if mask is None else mask
        return definition.triangle_attention(z, full, w, starting)
    parts = "torch" if impl == "cuequivariance" else impl
    if parts == "triton":  # all of it must run before any of it does
        choose_rows("triangle_attention", parts, z, "z", (z.shape[-1],))
        choose_core(parts, z, w.q.shape[0] // w.heads)
    x, keep = (z, mask) if starting else (z.transpose(1, 2), swapped(mask))
    lines = project_lines(x, w, parts)
    bias = project_bias(x, w, parts)
    carry = attend_lines(lines, lines.kv[0], bias, key_mask(keep), None, True, impl)
    out = line_output(x, carry, w, parts)
    return out if starting else out.transpose(1, 2)


def swapped(mask: Tensor | None) -> Tensor | None:
    """Transpose the mask of a tile; None stays None."""
    return None if mask is None else mask.transpose(1, 2)
