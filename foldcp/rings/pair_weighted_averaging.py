"""Pair weighted averaging: MSA values weighted by a softmax over the columns of a pair tile.

    o_si = sum_j softmax_j(b_ij) v_sj,  m_si += (sigmoid(g_si) * o_si) Wo

Each rank sums over its own columns; the Q partial sums of a mesh row meet at the rank that owns
the tokens. Ownership on a 2x2 mesh as in attention_pair_bias: rank (0, 1) weights v of shards
2, 3 for the tokens of shards 0, 1 and sends one half to rank (0, 0), keeping the other.
Backward: the gradients of v and of the partial sums flow back through the transposed exchanges.

Source: AlphaFold 3 supplement, Algorithm 10.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foldcp.fabric.exchange.autograd import fetch
from foldcp.fabric.mesh import Mesh
from foldcp.layout.plans import partials_plan, row_plan, token_plan
from foldcp.layout.tiles import PairLayout
from foldcp_kernels.pair_weighted_averaging.parts import average, masked


def column_weights(
    logits: Tensor, layout: PairLayout, mesh: Mesh, mask: Tensor | None = None
) -> Tensor:
    """Take the softmax over all N columns of logits that are spread over a mesh row.

    Args:
        logits: [B, H, T_r, T_c].
        layout: the tiling.
        mesh: the mesh.
        mask: pairs that count [B, T_r, T_c], 1 = keep; None keeps all real tokens.

    Returns:
        This rank's part of the weights [B, H, T_r, valid columns].

    Raises:
        ValueError: `logits` is not this rank's tile.
    """
    mesh.check(logits, layout, "logits", channels_last=False)
    keys = layout.valid(layout.col_span())
    logits = masked(logits, mask)[..., :keys]
    if layout.mesh_cols == 1:
        return logits.softmax(-1)
    # Largest logit and sum of weights apart: beside logits of 1e9 one number would lose the count.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    least = logits.new_full(logits.shape[:-1], torch.finfo(logits.dtype).min)
    top = logits.detach().amax(-1) if keys else least
    weights = (logits - top[..., None]).exp()
    total = weights.sum(-1)
    source = torch.stack((top, total), -1).unsqueeze(0)
    (parts,) = fetch(mesh, row_plan(layout), (source,), ((0, 3),), "pair_weighted_averaging")
    tops, totals = parts[..., 0].detach(), parts[..., 1]
    most = tops.amax(0)
    total = (totals * (tops - most).exp()).sum(0)
    return weights * ((top - most).exp() / total)[..., None]


def pair_weighted_averaging(v: Tensor, weights: Tensor, layout: PairLayout, mesh: Mesh) -> Tensor:
    """Average values over all tokens with weights, for this rank's tokens.

    Args:
        v: values of this rank's tokens [B, S, n, H, D].
        weights: from `column_weights`, [B, H, T_r, valid columns].
        layout: the tiling.
        mesh: the mesh.

    Returns:
        [B, S, n, H, D].
    """
    plan = token_plan(layout, ("cols",))
    (v,) = fetch(mesh, plan, (v,), ((2,),), "pair_weighted_averaging")
    o = average(v[:, :, : weights.shape[-1]], weights)  # [B, S, T_r, H, D]
    if layout.mesh_cols == 1:
        return o
    (parts,) = fetch(
        mesh, partials_plan(layout, 1), (o.unsqueeze(0),), ((0, 3),), "pair_weighted_averaging"
    )
    return parts.sum(0)
