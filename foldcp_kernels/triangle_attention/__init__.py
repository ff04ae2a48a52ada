"""Triangle attention: projections of a chunk of lines, attention, output.

For a line i (a row for the starting node, a column for the ending node):
    o_ij = sum_k softmax_k(q_ij . k_ik / sqrt(D) + b_jk + 1e9 (mask_ik - 1)) v_ik
    z_ij += (sigmoid(LN(z_ij) Wg) * o_ij) Wo

Source: AlphaFold 2 supplement, Algorithms 13 and 14; AlphaFold 3 supplement, Algorithms 14 and 15.
"""

from __future__ import annotations

from torch import Tensor

from foldcp_kernels.core.arguments import check
from foldcp_kernels.core.recompute import nothing
from foldcp_kernels.triangle_attention import definition
from foldcp_kernels.triangle_attention.choice import choose_parts
from foldcp_kernels.triangle_attention.cuequivariance import prepare
from foldcp_kernels.triangle_attention.definition import (
    TriangleAttentionWeights as TriangleAttentionWeights,
)
from foldcp_kernels.triangle_attention.parts import (
    attend_lines,
    key_mask,
    line_output,
    project_bias,
    project_lines,
    swapped,
)


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
        full = z.new_ones(z.shape[:3]) if mask is None else mask
        return definition.triangle_attention(z, full, w, starting)
    parts = choose_parts(z, w, impl)
    x, keep = (z, mask) if starting else (z.transpose(1, 2), swapped(mask))
    lines = project_lines(x, w, parts)
    bias, keep = project_bias(x, w, parts), key_mask(keep)
    if parts.cuequivariance:
        bias, keep = prepare(bias, keep, lines.q.dtype)
    carry = attend_lines(lines, lines.kv[0], bias, keep, None, True, parts)
    out = line_output(x, carry, w, parts)
    return out if starting else out.transpose(1, 2)
