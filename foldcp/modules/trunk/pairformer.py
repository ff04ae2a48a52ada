"""Boltz's pairformer stacks on tiles: their modules and parameters, the blocks of `stack`."""

from __future__ import annotations

from torch import Tensor, nn

from foldcp.fabric.mesh import Mesh
from foldcp.layout.tiles import PairLayout
from foldcp.modules.base import Block, TiledModule, draw_pair_dropout
from foldcp.modules.graphs.block_graph import run_blocks
from foldcp.modules.trunk.block_weights import (
    AttentionPairBiasWeights,
    PairformerBlockWeights,
    PairWeights,
    SingleWeights,
    update_pair,
)
from foldcp.modules.trunk.masks import stack_masks
from foldcp.modules.trunk.stack import PairformerBlock, PairformerStack, pair_operations
from foldcp.modules.trunk.transition import Transition
from foldcp.modules.trunk.triangle import TriangleAttention, TriangleMultiplication


class PairModules(TiledModule):
    """The pair ops of one of Boltz's blocks: four triangle updates and a transition.

    Attributes:
        transition_name: what the twin calls the pair transition.
    """

    transition_name = "transition_z"

    def __init__(self, twin: nn.Module, mesh: Mesh) -> None:
        super().__init__(twin, mesh)
        self.tri_mul_out = TriangleMultiplication(twin.tri_mul_out, mesh)
        self.tri_mul_in = TriangleMultiplication(twin.tri_mul_in, mesh)
        self.tri_att_start = TriangleAttention(twin.tri_att_start, mesh)
        self.tri_att_end = TriangleAttention(twin.tri_att_end, mesh)
        name = self.transition_name
        self.add_module(name, Transition(twin.get_submodule(name), mesh))

    def pair_weights(self) -> PairWeights:
        """Return the parameters of the pair ops."""
        pair_transition = self.get_submodule(self.transition_name)
        assert isinstance(pair_transition, Transition)
        return PairWeights(
            self.tri_mul_out.weights(),
            self.tri_mul_in.weights(),
            self.tri_att_start.weights(),
            self.tri_att_end.weights(),
            pair_transition.weights(),
        )


class PairformerNoSeqLayer(PairModules, Block):
    """A pair block without a single track (MSA module, templates)."""

    def draw(self, z: Tensor, layout: PairLayout) -> None:
        """See `Block`."""
        draw_pair_dropout(z.shape[0], layout.n, z.device)

    def compute(
        self, z: Tensor, mask: Tensor, keys: Tensor | None, layout: PairLayout
    ) -> tuple[Tensor]:
        """See `Block` and `update_pair`."""
        return (update_pair(z, self.pair_weights(), layout, self.mesh, mask, keys),)

    def operations(self, *state: Tensor) -> float:
        """See `Block`."""
        return pair_operations(state[0])


class AttentionPairBias(TiledModule):
    """Attention of the single track with a bias from the pair tile. Algorithm 24."""

    def weights(self, norm: nn.LayerNorm) -> AttentionPairBiasWeights:
        """Return the parameters in the order of the block.

        Args:
            norm: of the single.
        """
        pair_norm, pair = self.proj_z[0], self.proj_z[1]
        return AttentionPairBiasWeights(
            norm.weight,
            norm.bias,
            pair_norm.weight,
            pair_norm.bias,
            pair.weight,
            self.proj_q.weight,
            self.proj_k.weight,
            self.proj_v.weight,
            self.proj_g.weight,
            self.proj_o.weight,
            pair.weight.shape[0],
            q_bias=self.proj_q.bias,
        )


class PairformerLayer(PairModules, PairformerBlock):
    """A pair block and the single track that reads its pair tile. AlphaFold 3, Algorithm 17."""

    def __init__(self, twin: nn.Module, mesh: Mesh) -> None:
        super().__init__(twin, mesh)
        self.attention = AttentionPairBias(twin.attention, mesh)
        self.transition_s = Transition(twin.transition_s, mesh)

    def weights(self) -> PairformerBlockWeights:
        """See `PairformerBlock`."""
        post = self.s_post_norm  # a LayerNorm or an Identity
        after = (post.weight, post.bias) if isinstance(post, nn.LayerNorm) else (None, None)
        attention = self.attention.weights(self.pre_norm_s)
        single = SingleWeights(attention, self.transition_s.weights(), *after)
        return PairformerBlockWeights(self.pair_weights(), single)

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


class PairformerModule(TiledModule, PairformerStack):
    """A stack of Boltz's blocks, of class `layer`."""

    layer: type[PairformerBlock] = PairformerLayer

    def __init__(self, twin: nn.Module, mesh: Mesh) -> None:
        super().__init__(twin, mesh)
        self.layers = nn.ModuleList(self.layer(x, mesh) for x in twin.layers)


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
