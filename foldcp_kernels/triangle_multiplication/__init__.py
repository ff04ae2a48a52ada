"""The local parts of triangle multiplication: planes in, contraction, gated output.

    a, b = mask * sigmoid(LN(z) Wg) * (LN(z) Wp)            planes, channel-major
    x_ij = sum_k a_ik b_jk   (outgoing)    or    sum_k a_ki b_kj   (incoming)
    z_ij += (LN(x_ij) Wo) * sigmoid(LN(z_ij) Wgo)

Source: AlphaFold 2 supplement, Algorithms 11 and 12; AlphaFold 3 supplement, Algorithms 12 and 13.
"""

from __future__ import annotations

from torch import Tensor

from foldcp_kernels.core.arguments import check
from foldcp_kernels.core.recompute import nothing
from foldcp_kernels.triangle_attention import swapped
from foldcp_kernels.triangle_multiplication import definition
from foldcp_kernels.triangle_multiplication.contraction import contract
from foldcp_kernels.triangle_multiplication.definition import (
    TriangleMultiplicationWeights as TriangleMultiplicationWeights,
)
from foldcp_kernels.triangle_multiplication.parts import (
    choose_parts,
    gated_update,
    project_planes,
    run_cuequivariance,
    scaled_planes,
)


def triangle_multiplication(
    z: Tensor,
    mask: Tensor | None,
    w: TriangleMultiplicationWeights,
    outgoing: bool,
    impl: str | None = None,
    contraction: str = "same",
) -> Tensor:
    """Compute z + triangle multiplication of a whole pair tensor; in place without gradients.

    Args:
        z: [B, N, N, C].
        mask: [B, N, N], 1 = keep, None keeps all.
        w: weights.
        outgoing: Algorithm 12 (True) or 13 (False).
        impl: see `dispatch`.
        contraction: "same": in what the projections are computed in; "fp8": of e4m3 planes, added
            up in float32, without gradients. The reference is exact either way.

    Returns:
        [B, N, N, C], `z` itself when gradients are off.

    Raises:
        ValueError: a shape or dtype that does not fit, or a named `impl` that cannot run.

    Source: AlphaFold 3 supplement, Algorithms 12 and 13.
    """
    check("triangle_multiplication", z, mask, *vars(w).values())
    if not z.numel():
        return nothing(z, *vars(w).values())
    if impl == "reference":
        full = z.new_ones(z.shape[:3]) if mask is None else mask
        return definition.triangle_multiplication(z, full, w, outgoing)
    parts = choose_parts(z, w, impl, contraction)
    if parts.cuequivariance:
        return run_cuequivariance(z, mask, w, outgoing)
    # Incoming contracts over rows: with transposed planes it is the same product.
    across, keep = (z, mask) if outgoing else (z.transpose(1, 2), swapped(mask))
    planes = project_planes(across, keep, w, parts)
    d = planes.shape[1] // 2
    scaled = scaled_planes(z, w, parts, (0, d))
    x = contract(None, planes[:, :d], planes[:, d:], True, scaled=scaled)
    return gated_update(z, x, w, parts)
