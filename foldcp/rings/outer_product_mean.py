"""Outer product mean: a for the rows, b for the columns of the tile, gathered by token.

On a 2x2 mesh (token shards 0..3, shard i on rank i) rank (0, 1) takes a of shards 0, 1 and b of
shards 2, 3; rank (1, 0) a of 2, 3 and b of 0, 1. There is one step.
Backward: the gradients of a and b are added up at the owners of their shards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foldcp.fabric.exchange.autograd import fetch
from foldcp.fabric.mesh import Mesh
from foldcp.layout.plans import token_plan
from foldcp.layout.tiles import PairLayout
from foldcp_kernels.core.recompute import nothing
from foldcp_kernels.outer_product_mean import outer_product_mean as local


def outer_product_mean(
    z: Tensor,
    a: Tensor,
    b: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    layout: PairLayout,
    mesh: Mesh,
) -> Tensor:
    """Compute z + OuterProductMean(a, b) on tiles; in place when gradients are off.

    Args:
        z: pair tile [B, T_r, T_c, C].
        a: masked left projection of this rank's tokens [B, S, n, D].
        b: the right one.
        mask: [B, S, n], 1 = keep.
        weight: [C, D * D].
        bias: [C].
        layout: the tiling.
        mesh: the mesh.

    Returns:
        The updated tile.

    Raises:
        ValueError: `z` is not this rank's tile, or a shape or dtype does not fit it.

    Source: AlphaFold 3 supplement, Algorithm 9.
    """
    mesh.check(z, layout)
    mesh.fits("outer_product_mean tile", z, a, b, mask, weight, bias, N=layout.shard)
    if not z.numel():
        return nothing(z, a, b, weight, bias)
    mask = mask.to(a.dtype)
    plan = token_plan(layout, ("rows", "cols", "rows", "cols"))
    a, b, mask_r, mask_c = fetch(mesh, plan, (a, b, mask, mask), ((2,),) * 4, "outer_product_mean")
    # Counts reach S, beyond what bf16 holds exactly.
    wide = torch.float64 if mask.dtype == torch.float64 else torch.float32
    with torch.autocast(z.device.type, enabled=False):
        count = mask_r.to(wide).transpose(1, 2) @ mask_c.to(wide)
    return local(z, a, b, count, weight, bias)
