"""The trunk of Boltz-1 on tiles: input embedding, MSA and pairformer blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foldcp.fabric.mesh import Mesh
from foldcp.layout.tiles import AtomLayout, PairLayout
from foldcp.modules.atoms.encoder import AtomEncoder, AtomEncoderOptions
from foldcp.modules.atoms.windows import Feats
from foldcp.modules.base import Block, TiledModule, draw_pair_dropout
from foldcp.modules.trunk.block_weights import (
    PairformerBlockWeights,
    SingleWeights,
    update_pair,
)
from foldcp.modules.trunk.input_embedder import atom_part
from foldcp.modules.trunk.msa import MSAModule as SharedMSAModule
from foldcp.modules.trunk.msa import (
    OuterProductMean,
    PairWeightedAveraging,
    draw_row_dropout,
    msa_operations,
)
from foldcp.modules.trunk.pairformer import AttentionPairBias, PairModules
from foldcp.modules.trunk.stack import PairformerBlock, PairformerStack, pair_operations
from foldcp.modules.trunk.transition import Transition

RES_TYPES, POCKET_KINDS = 33, 4  # Boltz's numbers of residue types and of pocket classes


class InputEmbedder(TiledModule):
    """Single inputs of this rank's token shard. AlphaFold 3 supplement, Algorithm 2.

    Args:
        twin: Boltz-1's InputEmbedder.
        mesh: the mesh.
        options: what the atom features are.
    """

    def __init__(self, twin: nn.Module, mesh: Mesh, options: AtomEncoderOptions) -> None:
        super().__init__(twin, mesh)
        self.atom_attention_encoder = AtomEncoder(twin.atom_attention_encoder, mesh, options)
        finish_layers(self.atom_attention_encoder.atom_encoder.diffusion_transformer)

    @torch.no_grad()
    def forward(self, feats: Feats, layout: PairLayout, atom_layout: AtomLayout) -> Tensor:
        """Embed the tokens (inference only).

        Args:
            feats: collated compact features, the same on every rank.
            layout: the tiling of tokens.
            atom_layout: the shards of atom windows.

        Returns:
            This rank's shard [1, n, token_s + 71]: what the atoms give, residue type, profile,
            mean deletions and pocket class; padding tokens are zero.

        Raises:
            ValueError: `atom_layout` does not fit the features or the mesh.

        Source: AlphaFold 3 supplement, Algorithm 2.
        """
        lo, hi = layout.shard_span()
        real = layout.valid((lo, hi))
        keys = ("res_type", "profile", "deletion_mean", "pocket_feature")
        kind, profile, deletions, pocket = (feats[k][:, lo : lo + real] for k in keys)
        encoder = self.atom_attention_encoder
        projections = pair_projections(encoder.atom_encoder.diffusion_transformer)
        atoms = atom_part(encoder, encoder, projections, feats, layout, atom_layout)
        known = (F.one_hot(kind, RES_TYPES), profile, deletions[..., None])
        known = (*known, F.one_hot(pocket, POCKET_KINDS))
        known = torch.cat([x.to(atoms.dtype) for x in known], -1)
        return torch.cat([atoms, F.pad(known, (0, 0, 0, hi - lo - real))], -1)


def finish_layers(transformer: nn.Module) -> None:
    """Give the layers of a Boltz-1 DiffusionTransformer what Boltz-2's end on.

    It is a norm that Boltz-2 may leave out, and has no parameters then.
    """
    for layer in transformer.layers:
        layer.post_lnorm = nn.Identity()


def pair_projections(transformer: nn.Module) -> list[nn.Module]:
    """List (LayerNorm, Linear) from pairs to heads, of each layer of a DiffusionTransformer."""
    return [layer.pair_bias_attn.proj_z for layer in transformer.layers]


class MSALayer(PairModules, Block):
    """One block of the MSA module; the pair ops are its own."""

    transition_name = "z_transition"
    in_place = (True, True)

    def __init__(self, twin: nn.Module, mesh: Mesh) -> None:
        super().__init__(twin, mesh)
        self.pair_weighted_averaging = PairWeightedAveraging(twin.pair_weighted_averaging, mesh)
        self.msa_transition = Transition(twin.msa_transition, mesh)
        self.outer_product_mean = OuterProductMean(twin.outer_product_mean, mesh)

    def draw(self, z: Tensor, m: Tensor, layout: PairLayout) -> None:
        """See `Block`."""
        draw_row_dropout(m)
        draw_pair_dropout(z.shape[0], layout.n, z.device)

    def operations(self, *state: Tensor) -> float:
        """See `Block`."""
        z, m = state
        return msa_operations(z, m) + pair_operations(z)

    def compute(
        self,
        z: Tensor,
        m: Tensor,
        mask: Tensor,
        keys: Tensor | None,
        msa_mask: Tensor,
        layout: PairLayout,
    ) -> tuple[Tensor, Tensor]:
        """See `foldcp.modules.trunk.msa.MSALayer.compute`."""
        m = self.pair_weighted_averaging(m, z, layout, keys)
        m = self.msa_transition(m)
        z = self.outer_product_mean(z, m, msa_mask, layout)
        return update_pair(z, self.pair_weights(), layout, self.mesh, mask, keys), m


class MSAModule(SharedMSAModule):
    """The MSA module; `forward` returns stock's z + MSAModule(z)."""

    layer = MSALayer


class PairformerLayer(PairModules, PairformerBlock):
    """A pair block and, unless left out, the single track. AlphaFold 3, Algorithm 17.

    Args:
        twin: the block of Boltz-1.
        mesh: the mesh.
        updates_single: the block has a single track.
    """

    def __init__(self, twin: nn.Module, mesh: Mesh, updates_single: bool) -> None:
        super().__init__(twin, mesh)
        self.updates_single = updates_single
        if updates_single:
            self.attention = AttentionPairBias(twin.attention, mesh)
            self.transition_s = Transition(twin.transition_s, mesh)

    def draw(self, s: Tensor, z: Tensor, layout: PairLayout) -> None:
        """See `Block`."""
        draw_pair_dropout(z.shape[0], layout.n, z.device)

    def weights(self) -> PairformerBlockWeights:
        """See `PairformerBlock`."""
        if not self.updates_single:
            return PairformerBlockWeights(self.pair_weights())
        attention = self.attention.weights(self.attention.norm_s)
        single = SingleWeights(attention, self.transition_s.weights())
        return PairformerBlockWeights(self.pair_weights(), single)


@dataclass(frozen=True)
class PairformerOptions:
    """Say which blocks of a stack update the single.

    Attributes:
        updates_single: one for each block.
    """

    updates_single: tuple[bool, ...]


class PairformerModule(TiledModule, PairformerStack):
    """A stack of pairformer blocks.

    Args:
        twin: Boltz-1's PairformerModule.
        mesh: the mesh.
        options: which blocks update the single.
    """

    def __init__(self, twin: nn.Module, mesh: Mesh, options: PairformerOptions) -> None:
        super().__init__(twin, mesh)
        blocks = zip(twin.layers, options.updates_single, strict=True)
        self.layers = nn.ModuleList(PairformerLayer(x, mesh, single) for x, single in blocks)
