"""The conditioned transformer layer (tokens and atoms) and its stack over token shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from foldcp.fabric.mesh import Mesh
from foldcp.layout.tiles import PairLayout
from foldcp.rings.attention_pair_bias import attention_pair_bias
from foldcp_kernels.adaptive_norm import adaptive_norm, gated_residual


@dataclass(frozen=True)
class Gates:
    """Scales, shifts and gates of one layer, each [1, rows, C].

    `scale`, `shift` follow the norm before the attention and `gate` its output; `inner_*` do so
    around the transition. With `logits` the sigmoid of scales and gates is still to be taken.
    """

    scale: Tensor
    shift: Tensor
    gate: Tensor
    inner_scale: Tensor
    inner_shift: Tensor
    inner_gate: Tensor
    logits: bool


def gates_of(layer: nn.Module, s: Tensor, logits: bool = False) -> Gates:
    """Compute the scales, shifts and gates of a layer.

    Args:
        layer: a Boltz DiffusionTransformerLayer.
        s: its conditioning [1, rows, C].
        logits: leave the sigmoid to what uses the gates, where they serve one call only.

    Source: AlphaFold 3 supplement, Algorithms 25 and 26.
    """

    def gate(x: Tensor) -> Tensor:
        return x if logits else x.sigmoid_()

    def adapt(norm: nn.Module) -> tuple[Tensor, Tensor]:
        normal = norm.s_norm(s)
        return gate(norm.s_scale(normal)), norm.s_bias(normal)

    inner = layer.transition
    return Gates(
        *adapt(layer.adaln),
        gate(layer.output_projection_linear(s)),
        *adapt(inner.adaln),
        gate(inner.output_projection[0](s)),
        logits,
    )


def conditioned_layer(
    layer: nn.Module, a: Tensor, gates: Gates, attention: Callable[[nn.Module, Tensor], Tensor]
) -> Tensor:
    """Run one conditioned layer: attention, then transition, each with its residual.

    Args:
        layer: a Boltz DiffusionTransformerLayer.
        a: activations [M, rows, C].
        gates: of this layer, shared by all samples.
        attention: `(attention module, normed activations) -> [M, rows, C]`.

    Returns:
        New activations [M, rows, C].

    Source: AlphaFold 3 supplement, Algorithms 23 and 25.
    """
    b = adaptive_norm(a, gates.scale, gates.shift, gates.logits)
    a = gated_residual(a, gates.gate, attention(layer.pair_bias_attn, b), gates.logits)
    inner = layer.transition
    b = adaptive_norm(a, gates.inner_scale, gates.inner_shift, gates.logits)
    update = conditioned_update(inner, b)
    return layer.post_lnorm(gated_residual(a, gates.inner_gate, update, gates.logits))


def conditioned_update(transition: Any, b: Tensor) -> Tensor:
    """Compute a conditioned transition between its norm and its gate.

    Args:
        transition: a Boltz ConditionedTransitionBlock.
        b: normed activations [M, rows, C].

    Returns:
        [M, rows, C].

    Source: AlphaFold 3 supplement, Algorithm 25, lines 2 and 3.
    """
    x, swish = transition.swish_gate[0](b).chunk(2, -1)
    return transition.b_to_a(F.silu(swish).mul_(x).mul_(transition.a_to_b(b)))


def token_transformer(
    layers: Iterable[nn.Module],
    a: Tensor,
    s: Tensor,
    bias: Iterable[Tensor],
    layout: PairLayout,
    mesh: Mesh,
) -> Tensor:
    """Run the stack of conditioned layers over token shards.

    Args:
        layers: Boltz DiffusionTransformerLayers.
        a: activations of this rank's shard [M, n, C].
        s: conditioning [1, n, C]; all samples have the same noise level.
        bias: per layer, this rank's tile [H, T_r, T_c].
        layout: the tiling.
        mesh: the mesh.

    Returns:
        [M, n, C].

    Source: AlphaFold 3 supplement, Algorithm 23.
    """

    for layer, tile in zip(layers, bias, strict=True):

        def attention(att: nn.Module, b: Tensor, tile: Tensor = tile) -> Tensor:
            heads = (tile.shape[0], -1)
            q, k, v = (f(b).unflatten(-1, heads) for f in (att.proj_q, att.proj_k, att.proj_v))
            o = attention_pair_bias(q, k, v, tile[None], q.shape[-1] ** -0.5, layout, mesh)
            return att.proj_o(att.proj_g(b).sigmoid_().mul_(o.flatten(2)))

        a = conditioned_layer(layer, a, gates_of(layer, s, logits=True), attention)
    return a
