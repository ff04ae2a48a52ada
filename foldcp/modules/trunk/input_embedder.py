"""The input embedder: token features and atom attention to the single inputs, in token shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foldcp.fabric.mesh import Mesh
from foldcp.layout.tiles import AtomLayout, PairLayout
from foldcp.modules.atoms.encoder import AtomEncoder, AtomEncoderOptions
from foldcp.modules.atoms.transformer import atom_stack, atom_transformer
from foldcp.modules.atoms.windows import Feats, atom_shard
from foldcp.modules.base import TiledModule


@dataclass(frozen=True)
class InputEmbedderOptions:
    """Say what is embedded of a token besides its atoms, residue type and profile.

    Attributes:
        atoms: what is embedded of an atom.
        method: the experimental method.
        modified: whether the residue is modified.
        cyclic: whether the chain is cyclic.
        molecule: the type of the molecule.
    """

    atoms: AtomEncoderOptions
    method: bool
    modified: bool
    cyclic: bool
    molecule: bool


class InputEmbedder(TiledModule):
    """Single inputs of this rank's token shard. AlphaFold 3 supplement, Algorithm 2.

    Args:
        twin: Boltz-2's InputEmbedder.
        mesh: the mesh.
        options: what is embedded.
    """

    def __init__(self, twin: nn.Module, mesh: Mesh, options: InputEmbedderOptions) -> None:
        super().__init__(twin, mesh)
        self.options = options
        self.atom_encoder = AtomEncoder(twin.atom_encoder, mesh, options.atoms)

    @torch.no_grad()
    def forward(
        self, feats: Feats, layout: PairLayout, atom_layout: AtomLayout, affinity: bool = False
    ) -> Tensor:
        """Embed the tokens (inference only).

        Args:
            feats: collated compact features, the same on every rank.
            layout: the tiling of tokens.
            atom_layout: the shards of atom windows.
            affinity: take the affinity MSA's profile (`profile_affinity`).

        Returns:
            This rank's shard [1, n, token_s]; padding tokens are zero.

        Raises:
            ValueError: `atom_layout` does not fit the features or the mesh.

        Source: AlphaFold 3 supplement, Algorithm 2.
        """
        encoder, projections = self.atom_attention_encoder, [self.atom_enc_proj_z]
        options = self.options
        s = atom_part(self.atom_encoder, encoder, projections, feats, layout, atom_layout)
        valid = layout.valid(layout.shard_span())
        lo = layout.shard_span()[0]

        def local(name: str) -> Tensor:
            return feats[name][:, lo : lo + valid]

        end = "_affinity" if affinity else ""
        profile, deletions = local(f"profile{end}"), local(f"deletion_mean{end}")
        encode = self.msa_profile_encoding
        profile = torch.cat([profile, deletions[..., None]], -1).to(encode.weight.dtype)
        part = F.embedding(local("res_type"), self.res_type_encoding.weight.T) + encode(profile)
        if options.method:
            part = part + self.method_conditioning_init(local("method_feature"))
        if options.modified:
            part = part + self.modified_conditioning_init(local("modified"))
        if options.cyclic:
            cyclic = local("cyclic_period").clamp(max=1.0)[..., None]
            part = part + self.cyclic_conditioning_init(cyclic.to(encode.weight.dtype))
        if options.molecule:
            part = part + self.mol_type_conditioning_init(local("mol_type"))
        s[:, :valid] += part
        return s


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
        atom_layout: the shards of atom windows.

    Returns:
        This rank's shard [1, n, token_s].

    Raises:
        ValueError: `atom_layout` does not fit the features or the mesh.

    Source: AlphaFold 3 supplement, Algorithm 5.
    """
    mesh, transformer = embedding.mesh, encoder.atom_encoder
    depth = len(transformer.diffusion_transformer.layers)
    shard = atom_shard(feats, layout, atom_layout, mesh, depth)
    with torch.autocast(mesh.device.type, enabled=False):
        c = embedding.embed(feats, shard)
    bias = embedding.biases(feats, shard, c, projections)
    # A Linear that serves all layers has the heads of layer 0 first, then those of layer 1, ...
    shared = depth // len(projections)
    layers = [x.contiguous() for of_one in bias for x in of_one.chunk(shared, 1)]
    q = atom_transformer(atom_stack(transformer, c, layers), c)
    with torch.autocast(mesh.device.type, enabled=False):
        own = q[:, shard.own[0] : shard.own[1]]
        return shard.to_tokens(encoder.atom_to_token_trans(own)).to(q.dtype)
