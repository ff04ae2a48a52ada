"""Attention with pair bias: each rank attends q(rows_r) to k(cols_c) with its own bias tile.

The bias never travels. Ownership on a 2x2 mesh, tokens in 4 shards 0..3 (shard i on rank i):

    rank (r, c)   q of shards      k, v of shards    partial result goes to
    (0, 0)        0 1              0 1               rank 0 (shard 0), rank 1 (shard 1)
    (0, 1)        0 1              2 3               rank 0, rank 1
    (1, 0)        2 3              0 1               rank 2, rank 3
    (1, 1)        2 3              2 3               rank 2, rank 3

Backward: the gradients of q, k and v are added up at the owners of their shards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foldcp.fabric.exchange.autograd import fetch
from foldcp.fabric.mesh import Mesh
from foldcp.layout.plans import partials_plan, token_plan
from foldcp.layout.tiles import PairLayout
from foldcp_kernels.attention import attend_some, choose_core
from foldcp_kernels.attention.carry import merge_all
from foldcp_kernels.core.recompute import nothing


def attention_pair_bias(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, layout: PairLayout, mesh: Mesh
) -> Tensor:
    """Attend every token to every token with a bias that stays in its tile.

    Args:
        q: queries of this rank's token shard [M, n, H, D].
        k: keys [M, n, H, D].
        v: values [M, n, H, D].
        bias: [1 or M, H, T_r, T_c], the mask included.
        scale: factor on q . k.
        layout: the tiling.
        mesh: the mesh.

    Returns:
        The attention output of the shard [M, n, H, D].

    Raises:
        ValueError: `bias` is not this rank's tile, or a shape or dtype does not fit it.

    Source: AlphaFold 3 supplement, Algorithm 24; docs/design/strategies-and-cost.md.
    """
    if tuple(bias.shape[2:]) != (layout.tile_rows, layout.tile_cols):
        raise ValueError(
            f"`bias` tile is {list(bias.shape)}; layout (N={layout.n}, mesh {layout.mesh_rows}x"
            f"{layout.mesh_cols}) expects [.., .., {layout.tile_rows}, {layout.tile_cols}]"
        )
    mesh.fits("attention_pair_bias", q, k, v, bias, S=layout.shard)
    if not q.numel():
        return nothing(q, k, v, bias)
    if mesh.size > 1:
        plan = token_plan(layout, ("rows", "cols", "cols"))
        q, k, v = fetch(mesh, plan, (q, k, v), ((1,),) * 3, "attention_pair_bias")
    keys = layout.valid(layout.col_span())
    o, lse = _partial(q, k[:, :keys], v[:, :keys], bias[..., :keys], scale)
    if layout.mesh_cols == 1:
        return o
    # Written as they travel: contiguous over the tokens.
    sources = tuple(x.contiguous()[None] for x in (o, lse))
    plan = partials_plan(layout, 2)
    o, lse = fetch(mesh, plan, sources, ((0, 2), (0, 2)), "attention_pair_bias")
    return merge_all(o, *lse.unbind(-1))


def _partial(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(o [M, T_r, H, D], r and m [M, T_r, H, 2]) over this rank's keys, see `Carry`.

    Without any key r and m are what marks that for `merge_all`.
    """
    if k.shape[1] == 0:
        # Sums of nothing keep the autograd graph of every rank alike.
        zero = q * 0 + (k.sum() + v.sum() + bias.sum())
        m = zero.sum(-1, dtype=torch.promote_types(q.dtype, torch.float32)) - torch.inf
        return zero, torch.stack((torch.full_like(m, torch.finfo(m.dtype).min), m), -1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o, r, m, _ = attend_some(choose_core(q, k, v, bias), q, k, v, bias, scale)
    return o.transpose(1, 2), torch.stack((r, m), -1).transpose(1, 2)
