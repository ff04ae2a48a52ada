"""The input embedder: token features and atom attention to the single inputs, in token shards."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foldcp.layout import AtomLayout, PairLayout
from foldcp.mesh import Mesh
from foldcp.modules.atom_encoder import AtomEncoder
from foldcp.modules.atom_transformer import atom_stack, atom_transformer
from foldcp.modules.atoms import Feats, atom_block
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
            layout: the tiling of tokens. atom_layout: the blocks of atom windows.
            affinity: take the affinity MSA's profile (`profile_affinity`).

        Returns:
            This rank's shard [1, n, token_s]; padding tokens are zero.

        Raises:
            ValueError: `atom_layout` does not fit the features or the mesh.

        Source: AlphaFold 3 supplement, Algorithm 2.
        """
        s = self._atom_part(feats, layout, atom_layout)
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

    def _atom_part(self, feats: Feats, layout: PairLayout, atom_layout: AtomLayout) -> Tensor:
        """Mean over each token's atoms of what the atom transformer makes of them."""
        encoder = self.atom_attention_encoder
        transformer = encoder.atom_encoder
        depth = len(transformer.diffusion_transformer.layers)
        block = atom_block(feats, layout, atom_layout, self.mesh, depth)
        with torch.autocast(self.mesh.device.type, enabled=False):
            c = self.atom_encoder.embed(feats, block)
        (bias,) = self.atom_encoder.biases(feats, block, c, [self.atom_enc_proj_z])
        # One Linear serves all layers: its heads are those of layer 0, then of layer 1, ...
        bias = (x.contiguous() for x in bias.chunk(depth, 1))
        q = atom_transformer(atom_stack(transformer, c, bias), c)
        with torch.autocast(self.mesh.device.type, enabled=False):
            own = q[:, block.own[0] : block.own[1]]
            return block.to_tokens(encoder.atom_to_token_trans(own)).to(q.dtype)
