"""The pairformer stack on tiles: pair ops in the tile, the single track on token shards."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from foldcp.fabric.mesh import Mesh
from foldcp.layout.tiles import PairLayout
from foldcp.modules.base import Block, TiledModule, draw_pair_dropout, wide
from foldcp.modules.graphs.block_graph import run_blocks
from foldcp.modules.trunk.masks import stack_masks
from foldcp.modules.trunk.transition import Transition
from foldcp.modules.trunk.triangle import (
    TriangleAttentionEndingNode,
    TriangleAttentionStartingNode,
    TriangleMultiplicationIncoming,
    TriangleMultiplicationOutgoing,
)
from foldcp.rings.attention_pair_bias import attention_pair_bias
from foldcp_kernels.norm_linear import norm_linear_planes

Progress = Callable[[int, int], None]
MASKED = 1e6  # what Boltz takes from the logit of a masked token in the single track


class PairBlock(Block):
    """The pair ops of one block: four triangle updates and a transition.

    Attributes:
        transition_name: what the twin calls the pair transition.
    """

    transition_name = "transition_z"

    def __init__(self, twin: nn.Module, mesh: Mesh) -> None:
        super().__init__(twin, mesh)
        if getattr(twin, "post_layer_norm", False) and hasattr(twin, "s_post_norm"):
            self.s_post_norm = twin.s_post_norm
        self.tri_mul_out = TriangleMultiplicationOutgoing(twin.tri_mul_out, mesh)
        self.tri_mul_in = TriangleMultiplicationIncoming(twin.tri_mul_in, mesh)
        self.tri_att_start = TriangleAttentionStartingNode(twin.tri_att_start, mesh)
        self.tri_att_end = TriangleAttentionEndingNode(twin.tri_att_end, mesh)
        name = self.transition_name
        setattr(self, name, Transition(getattr(twin, name), mesh))

    def update_pair(
        self, z: Tensor, layout: PairLayout, mask: Tensor, keys: Tensor | None = None
    ) -> Tensor:
        """Run the pair ops; the caller draws, see `Block`.

        Args:
            z: pair tile [B, T_r, T_c, C].
            layout: the tiling.
            mask: see `stack_masks`.
            keys: see `stack_masks`.

        Returns:
            The updated tile, in place when gradients are off.
        """
        mask = mask.expand(len(z), -1, -1)
        keys = None if keys is None else keys.expand(len(z), -1, -1)
        z = self.tri_mul_out(z, layout, mask)
        z = self.tri_mul_in(z, layout, mask)
        z = self.tri_att_start(z, layout, keys)
        z = self.tri_att_end(z, layout, keys)
        return getattr(self, self.transition_name)(z)

    def operations(self, *state: Tensor) -> float:
        """See `Block`: two contractions, two attentions, projections and the transition."""
        z = next(x for x in state if x.ndim == 4)
        batch, rows, cols, channels = z.shape
        return batch * rows * cols * channels * (12 * max(rows, cols) + 68 * channels)


class PairformerNoSeqLayer(PairBlock):
    """A pair block without a single track (MSA module, templates)."""

    def draw(self, z: Tensor, layout: PairLayout) -> None:
        """See `Block`."""
        draw_pair_dropout(z.shape[0], layout.n, z.device)

    def compute(
        self, z: Tensor, mask: Tensor, keys: Tensor | None, layout: PairLayout
    ) -> tuple[Tensor]:
        """See `Block` and `PairBlock.update_pair`."""
        return (self.update_pair(z, layout, mask, keys),)


class AttentionPairBias(TiledModule):
    """Attention of the single track with a bias from the pair tile. Algorithm 24."""

    def __init__(self, twin: nn.Module, mesh: Mesh) -> None:
        super().__init__(twin, mesh)
        self.num_heads, self.head_dim = twin.num_heads, twin.head_dim

    def pair_bias(self, z: Tensor) -> Tensor:
        """Project pairs to biases: [B, T_r, T_c, C] -> [B, H, T_r, T_c]."""
        norm, linear = self.proj_z[0], self.proj_z[1]
        return norm_linear_planes(z, norm.weight, norm.bias, linear.weight)

    def forward(
        self, s: Tensor, bias: Tensor, layout: PairLayout, tokens: Tensor | None = None
    ) -> Tensor:
        """Attend with pair bias; the residual is not included.

        Args:
            s: normalised single shard [B, n, C].
            bias: [B, H, T_r, T_c].
            layout: the tiling.
            tokens: keys of the tile's columns [B, T_c], 1 = keep; None keeps all real ones.

        Returns:
            [B, n, C].
        """
        if tokens is not None:
            bias = bias + ((tokens.to(bias.dtype) - 1) * MASKED)[:, None, None]
        heads = (self.num_heads, self.head_dim)
        q, k, v = (p(s).unflatten(-1, heads) for p in (self.proj_q, self.proj_k, self.proj_v))
        o = attention_pair_bias(q, k, v, bias, self.head_dim**-0.5, layout, self.mesh)
        return self.proj_o(self.proj_g(s).sigmoid() * o.flatten(-2))


class PairformerLayer(PairBlock):
    """A pair block and the single track that reads its pair tile. AlphaFold 3, Algorithm 17."""

    in_place = (False, True)

    def __init__(self, twin: nn.Module, mesh: Mesh) -> None:
        super().__init__(twin, mesh)
        self.attention = AttentionPairBias(twin.attention, mesh)
        self.transition_s = Transition(twin.transition_s, mesh)

    def draw(self, s: Tensor, z: Tensor, layout: PairLayout) -> None:
        """See `Block`."""
        draw_pair_dropout(z.shape[0], layout.n, z.device)

    def forward(
        self,
        s: Tensor,
        z: Tensor,
        layout: PairLayout,
        token_mask: Tensor | None = None,
        pair_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run one block, its draws included.

        Args:
            s: single shard [B, n, C_s].
            z: pair tile [B, T_r, T_c, C].
            layout: the tiling.
            token_mask: mask of the tokens, see `stack_masks`.
            pair_mask: mask of the pairs, see `stack_masks`.

        Returns:
            (s, z) updated; z in place when gradients are off.

        Raises:
            ValueError: a tensor that does not fit the layout.
        """
        self.draw(s, z, layout)
        return self.compute(s, z, *stack_masks(layout, self.mesh, token_mask, pair_mask), layout)

    def compute(
        self,
        s: Tensor,
        z: Tensor,
        mask: Tensor,
        keys: Tensor | None,
        tokens: Tensor | None,
        layout: PairLayout,
    ) -> tuple[Tensor, Tensor]:
        """Run one block without its draws.

        Args:
            s: single shard [B, n, C_s].
            z: pair tile [B, T_r, T_c, C].
            layout: the tiling.
            mask: see `stack_masks`.
            keys: see `stack_masks`.
            tokens: see `stack_masks`.

        Returns:
            (s, z) updated; z in place when gradients are off.
        """
        z = self.update_pair(z, layout, mask, keys)
        with torch.autocast(z.device.type, enabled=False):
            s = wide(s)
            bias = self.attention.pair_bias(z)
            s = s + self.attention(self.pre_norm_s(s), bias, layout, tokens)
            s = self.s_post_norm(self.transition_s(s))
        return s, z


class PairformerModule(TiledModule):
    """A stack of pairformer blocks of class `layer`."""

    layer: type[PairBlock] = PairformerLayer

    def __init__(self, twin: nn.Module, mesh: Mesh) -> None:
        super().__init__(twin, mesh)
        self.layers = nn.ModuleList(self.layer(x, mesh) for x in twin.layers)

    def forward(
        self,
        s: Tensor,
        z: Tensor,
        layout: PairLayout,
        progress: Progress | None = None,
        token_mask: Tensor | None = None,
        pair_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run all blocks.

        Args:
            s: single shard [B, n, C_s].
            z: pair tile [B, T_r, T_c, C].
            layout: the tiling.
            progress: called with (blocks done, blocks in all).
            token_mask: mask of the tokens, see `stack_masks`.
            pair_mask: mask of the pairs, see `stack_masks`.

        Returns:
            (s, z) updated; z in place when gradients are off.
        """
        masks = stack_masks(layout, self.mesh, token_mask, pair_mask)
        s, z = run_blocks(self.layers, (s, z), masks, layout, progress)
        return s, z


class PairformerNoSeqModule(TiledModule):
    """A stack of pair blocks without a single track."""

    def __init__(self, twin: nn.Module, mesh: Mesh) -> None:
        super().__init__(twin, mesh)
        self.layers = nn.ModuleList(PairformerNoSeqLayer(x, mesh) for x in twin.layers)

    def forward(self, z: Tensor, layout: PairLayout, pair_mask: Tensor | None = None) -> Tensor:
        """Run all blocks on a pair tile [B, T_r, T_c, C]; in place when gradients are off.

        Args:
            z: the tile.
            layout: the tiling.
            pair_mask: see `stack_masks`.
        """
        masks = stack_masks(layout, self.mesh, None, pair_mask)
        (z,) = run_blocks(self.layers, (z,), masks[:2], layout)
        return z
