"""The atom transformer on this rank's buffer of windows, without communication."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from foldcp.modules.atoms.windows import key_windows, query_windows
from foldcp.modules.base import wide
from foldcp.modules.diffusion.token_transformer import Gates, conditioned_layer, gates_of
from foldcp_kernels.attention import attend


@dataclass(frozen=True)
class AtomStack:
    """A stack of window layers with everything that its conditioning decides.

    Args:
        layers: Boltz DiffusionTransformerLayers.
        gates: of each layer, over the atoms of the buffer.
        bias: of each layer [W, H, 32, 128], key mask included.
    """

    layers: Sequence[nn.Module]
    gates: tuple[Gates, ...]
    bias: tuple[Tensor, ...]


def atom_stack(transformer: nn.Module, c: Tensor, bias: Iterable[Tensor]) -> AtomStack:
    """Prepare a Boltz AtomTransformer for one conditioning.

    Args:
        transformer: a Boltz AtomTransformer.
        c: conditioning of the buffer's atoms [1, a, atom_s].
        bias: of each layer [W, H, 32, 128].
    """
    layers = tuple(transformer.diffusion_transformer.layers)
    return AtomStack(layers, tuple(gates_of(layer, c) for layer in layers), tuple(bias))


def atom_transformer(stack: AtomStack, q: Tensor) -> Tensor:
    """Run the stack over the windows of a buffer.

    Args:
        stack: the prepared layers.
        q: activations [M, a, atom_s], a = 32 W.

    Returns:
        [M, a, atom_s]; right for the own shard when the halo has 2 windows per layer.

    Source: AlphaFold 3 supplement, Algorithm 7.
    """
    if q.shape[1] == 0:
        return q
    for layer, gates, bias in zip(stack.layers, stack.gates, stack.bias, strict=True):

        def attention(att: nn.Module, b: Tensor, bias: Tensor = bias) -> Tensor:
            return window_attention(att, b, bias)

        q = conditioned_layer(layer, q, gates, attention)
    return q


def window_attention(att: nn.Module, b: Tensor, bias: Tensor) -> Tensor:
    """Attend, gated, from each window's 32 queries to its 128 keys.

    Args:
        att: a Boltz AttentionPairBias.
        b: normed activations [M, a, C].
        bias: [W, H, 32, 128], key mask included.

    Returns:
        [M, a, C].
    """
    heads = (bias.shape[1], -1)
    # Keys are projected once per atom and read through overlapping windows.
    projected = att.proj_v(b)
    q = query_windows(wide(att.proj_q(b))).unflatten(-1, heads).transpose(2, 3)
    k, v = (
        key_windows(wide(x)).unflatten(2, heads).transpose(-1, -2)
        for x in (att.proj_k(b), projected)
    )  # [M, W, H, 128, D]
    # All samples share a window's bias.
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # [W, M, H, 32 or 128, D]
    o, _ = attend(q, k, v, bias[:, None], q.shape[-1] ** -0.5)
    o = o.permute(1, 0, 3, 2, 4).reshape(b.shape).to(projected.dtype)
    return att.proj_o(att.proj_g(b).sigmoid_().mul_(o))
