"""The input embedder: token features and atom attention to the single inputs, in token shards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foldcp.fabric.mesh import Mesh
from foldcp.layout.tiles import AtomLayout, PairLayout
from foldcp.modules.atoms.encoder import AtomEncoder
from foldcp.modules.atoms.transformer import atom_stack, atom_transformer
from foldcp.modules.atoms.windows import Feats, atom_block
from foldcp.modules.base import TiledModule

_FLAGS = (
    "add_method_conditioning",
    "add_modified_flag",
    "add_cyclic_flag",
    "add_mol_type_feat",
)


class InputEmbedder(TiledModule):
    """Single inputs of this rank's token shard. AlphaFold 3 supplement, Algorithm 2."""

    def __init__(self, twin: nn.Module, mesh: Mesh) -> None:
        super().__init__(twin, mesh)
        self.atom_encoder = AtomEncoder(twin.atom_encoder, mesh)
        for name in _FLAGS:
            setattr(self, name, getattr(twin, name))

    @torch.no_grad()
    def forward(
        self, feats: Feats, layout: PairLayout, atom_layout: AtomLayout, affinity: bool = False
    ) -> Tensor:
        """Embed the tokens (inference only).

        Args:
            feats: collated compact features, the same on every rank.
            layout: the tiling of tokens.
            atom_layout: the blocks of atom windows.
            affinity: take the affinity MSA's profile (`profile_affinity`).

        Returns:
            This rank's shard [1, n, token_s]; padding tokens are zero.

        Raises:
            ValueError: `atom_layout` does not fit the features or the mesh.

        Source: AlphaFold 3 supplement, Algorithm 2.
        """
        encoder, projections = self.atom_attention_encoder, [self.atom_enc_proj_z]
        s = atom_part(self.atom_encoder, encoder, projections, feats, layout, atom_layout)
        valid = layout.valid(layout.shard_span())
        lo = layout.shard_span()[0]
        local = {k: feats[k][:, lo : lo + valid] for k in self._keys(affinity)}
        profile, deletions = (local[k] for k in self._keys(affinity)[1:3])
        encode = self.msa_profile_encoding
        profile = torch.cat([profile, deletions[..., None]], -1).to(encode.weight.dtype)
        part = F.embedding(local["res_type"], self.res_type_encoding.weight.T) + encode(profile)
        if self.add_method_conditioning:
            part = part + self.method_conditioning_init(local["method_feature"])
        if self.add_modified_flag:
            part = part + self.modified_conditioning_init(local["modified"])
        if self.add_cyclic_flag:
            cyclic = local["cyclic_period"].clamp(max=1.0)[..., None]
            part = part + self.cyclic_conditioning_init(cyclic.to(encode.weight.dtype))
        if self.add_mol_type_feat:
            part = part + self.mol_type_conditioning_init(local["mol_type"])
        s[:, :valid] += part
        return s

    def _keys(self, affinity: bool) -> tuple[str, ...]:
        end = "_affinity" if affinity else ""
        used = zip(_FLAGS, ("method_feature", "modified", "cyclic_period", "mol_type"), strict=True)
        chosen = tuple(key for flag, key in used if getattr(self, flag))
        return ("res_type", f"profile{end}", f"deletion_mean{end}", *chosen)


def atom_part(
    embedding: AtomEncoder,
    encoder: nn.Module,
    projections: Sequence[nn.Module],
    feats: Feats,
    layout: PairLayout,
    atom_layout: AtomLayout,
) -> Tensor:
    """Average over each token's atoms what the atom transformer makes of them.

    Args:
        embedding: embeds the atoms and their pairs.
        encoder: the Boltz AtomAttentionEncoder.
        projections: (LayerNorm, Linear) from atom pairs to heads: one per layer, or one for all.
        feats: collated compact features.
        layout: the tiling of tokens.
        atom_layout: the blocks of atom windows.

    Returns:
        This rank's shard [1, n, token_s].

    Raises:
        ValueError: `atom_layout` does not fit the features or the mesh.

    Source: AlphaFold 3 supplement, Algorithm 5.
    """
    mesh, transformer = embedding.mesh, encoder.atom_encoder
    depth = len(transformer.diffusion_transformer.layers)
    block = atom_block(feats, layout, atom_layout, mesh, depth)
    with torch.autocast(mesh.device.type, enabled=False):
        c = embedding.embed(feats, block)
    bias = embedding.biases(feats, block, c, projections)
    # A Linear that serves all layers has the heads of layer 0 first, then those of layer 1, ...
    shared = depth // len(projections)
    layers = [x.contiguous() for of_one in bias for x in of_one.chunk(shared, 1)]
    q = atom_transformer(atom_stack(transformer, c, layers), c)
    with torch.autocast(mesh.device.type, enabled=False):
        own = q[:, block.own[0] : block.own[1]]
        return block.to_tokens(encoder.atom_to_token_trans(own)).to(q.dtype)
