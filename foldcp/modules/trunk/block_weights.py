"""The weights of a pairformer block as plain tensors, and what the block computes from them.

Every architecture with AlphaFold 3's pairformer is the same computation on other names of its
parameters: `update_pair` and `update_single` are all of it, for Boltz's modules too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from foldcp.fabric.mesh import Mesh
from foldcp.layout.tiles import PairLayout
from foldcp.modules.base import wide
from foldcp.rings.attention_pair_bias import attention_pair_bias
from foldcp.rings.triangle_attention import triangle_attention
from foldcp.rings.triangle_multiplication import triangle_multiplication
from foldcp_kernels.core.dispatch import products_in
from foldcp_kernels.norm_linear import norm_linear_planes
from foldcp_kernels.transition import TransitionWeights, transition
from foldcp_kernels.triangle_attention import TriangleAttentionWeights
from foldcp_kernels.triangle_multiplication import TriangleMultiplicationWeights

MASKED = 1e6  # what Boltz takes from the logit of a masked token in the single track
_EPS = 1e-5  # of the LayerNorms


@dataclass(frozen=True)
class AttentionPairBiasWeights:
    """Hold the weights of one attention with pair bias: H heads of D channels.

    Attributes:
        norm_weight: LayerNorm of the single [C_s].
        norm_bias: its shift [C_s].
        pair_norm_weight: LayerNorm of the pair [C].
        pair_norm_bias: its shift [C].
        pair: Linear of the bias [H, C].
        q: Linear of the queries [H * D, C_s].
        k: Linear of the keys [H * D, C_s].
        v: Linear of the values [H * D, C_s].
        g: Linear of the gate [H * D, C_s].
        o: Linear of the output [C_s, H * D].
        heads: H.
        q_bias: bias of `q` [H * D], None without one.
        k_bias: bias of `k` [H * D].
        v_bias: bias of `v` [H * D].
        g_bias: bias of `g` [H * D].
        o_bias: bias of `o` [C_s].
    """

    norm_weight: Tensor
    norm_bias: Tensor
    pair_norm_weight: Tensor
    pair_norm_bias: Tensor
    pair: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    o: Tensor
    heads: int
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    g_bias: Tensor | None = None
    o_bias: Tensor | None = None

    def tensors(self) -> list[Tensor | None]:
        """List the weights in their order, without `heads`."""
        return [x for name, x in vars(self).items() if name != "heads"]


@dataclass(frozen=True)
class PairWeights:
    """Hold the weights of the pair ops of one block, in their order.

    Attributes:
        tri_mul_out: triangle multiplication, outgoing.
        tri_mul_in: triangle multiplication, incoming.
        tri_att_start: triangle attention, starting node.
        tri_att_end: triangle attention, ending node.
        transition: transition of the pair.
    """

    tri_mul_out: TriangleMultiplicationWeights
    tri_mul_in: TriangleMultiplicationWeights
    tri_att_start: TriangleAttentionWeights
    tri_att_end: TriangleAttentionWeights
    transition: TransitionWeights


@dataclass(frozen=True)
class SingleWeights:
    """Hold the weights of the single track of one block.

    Attributes:
        attention: attention with pair bias.
        transition: transition of the single.
        post_norm_weight: LayerNorm after both [C_s], None without one.
        post_norm_bias: its shift [C_s].
    """

    attention: AttentionPairBiasWeights
    transition: TransitionWeights
    post_norm_weight: Tensor | None = None
    post_norm_bias: Tensor | None = None


@dataclass(frozen=True)
class PairformerBlockWeights:
    """Hold the weights of one pairformer block.

    Attributes:
        pair: of the pair ops.
        single: of the single track; None leaves the single as it is.
    """

    pair: PairWeights
    single: SingleWeights | None = None


def update_pair(
    z: Tensor,
    w: PairWeights,
    layout: PairLayout,
    mesh: Mesh,
    mask: Tensor,
    keys: Tensor | None = None,
) -> Tensor:
    """Run the pair ops of one block.

    Args:
        z: pair tile [B, T_r, T_c, C].
        w: weights.
        layout: the tiling.
        mesh: the mesh.
        mask: pairs that multiplications sum over [1 or B, T_r, T_c], see `stack_masks`.
        keys: the same as keys of attention, see `stack_masks`.

    Returns:
        The updated tile, in place when gradients are off.

    Raises:
        ValueError: a tensor that does not fit the layout.

    Source: AlphaFold 3 supplement, Algorithm 17, lines 2 to 6.
    """
    mask = mask.expand(len(z), -1, -1)
    keys = None if keys is None else keys.expand(len(z), -1, -1)
    z = triangle_multiplication(z, mask, w.tri_mul_out, True, layout, mesh)
    z = triangle_multiplication(z, mask, w.tri_mul_in, False, layout, mesh)
    z = triangle_attention(z, keys, w.tri_att_start, True, layout, mesh)
    z = triangle_attention(z, keys, w.tri_att_end, False, layout, mesh)
    return transition(z, w.transition)


def update_single(
    s: Tensor,
    z: Tensor,
    w: SingleWeights,
    layout: PairLayout,
    mesh: Mesh,
    tokens: Tensor | None = None,
) -> Tensor:
    """Run the single track of one block; the single stays float32 (float64 where it is float64).

    Args:
        s: single shard [B, n, C_s].
        z: updated pair tile [B, T_r, T_c, C].
        w: weights.
        layout: the tiling.
        mesh: the mesh.
        tokens: keys of the tile's columns [B, T_c], 1 = keep; None keeps all real ones.

    Returns:
        A new shard.

    Raises:
        ValueError: a tensor that does not fit the layout or the others.

    Source: AlphaFold 3 supplement, Algorithm 17, lines 7 and 8.
    """
    with products_in(mesh.policy.single, z.device.type):
        s = wide(s)
        given = s, *w.attention.tensors(), w.post_norm_weight, w.post_norm_bias
        mesh.fits("single_track", *given, S=layout.shard, H=w.attention.heads)
        s = s + _attention(s, z, w.attention, layout, mesh, tokens)
        s = transition(s, w.transition)
        if w.post_norm_weight is None:
            return s
        return F.layer_norm(s, s.shape[-1:], w.post_norm_weight, w.post_norm_bias, _EPS)


def _attention(
    s: Tensor,
    z: Tensor,
    w: AttentionPairBiasWeights,
    layout: PairLayout,
    mesh: Mesh,
    tokens: Tensor | None,
) -> Tensor:
    """Attention with pair bias, without the residual. AlphaFold 3, Algorithm 24."""
    bias = norm_linear_planes(z, w.pair_norm_weight, w.pair_norm_bias, w.pair)
    if tokens is not None:
        bias = bias + ((tokens.to(bias.dtype) - 1) * MASKED)[:, None, None]
    x = F.layer_norm(s, s.shape[-1:], w.norm_weight, w.norm_bias, _EPS)
    q, k, v = (
        F.linear(x, weight, shift).unflatten(-1, (w.heads, len(weight) // w.heads))
        for weight, shift in ((w.q, w.q_bias), (w.k, w.k_bias), (w.v, w.v_bias))
    )
    o = attention_pair_bias(q, k, v, bias, q.shape[-1] ** -0.5, layout, mesh)
    gate = F.linear(x, w.g, w.g_bias).sigmoid()
    return F.linear(gate * o.flatten(-2), w.o, w.o_bias)
