"""The score model: atoms to tokens, the token transformer, and back to atoms, over a mesh."""

from __future__ import annotations

from dataclasses import dataclass
from math import pi

import torch
from torch import Tensor

from foldcp.layout.tiles import AtomLayout, PairLayout
from foldcp.modules.atoms.transformer import AtomStack, atom_stack, atom_transformer
from foldcp.modules.atoms.windows import AtomShard, Feats, atom_shard
from foldcp.modules.base import TiledModule, wide
from foldcp.modules.diffusion.conditioning import Conditioning
from foldcp.modules.diffusion.token_transformer import token_transformer
from foldcp.modules.trunk.transition import transition_weights
from foldcp_kernels.core.dispatch import products_in
from foldcp_kernels.transition import swiglu


@dataclass(frozen=True)
class Prepared:
    """Tensors that the sampling steps of one structure share.

    Args:
        layout: the tiling.
        shard: this rank's atoms.
        q: atom activations before the coordinates are added [1, a, atom_s].
        encoder: atom stack of the encoder with its biases and gates.
        decoder: atom stack of the decoder with its biases and gates.
        token_bias: per layer this rank's tile [H, T_r, T_c].
        single: the part of the conditioning without the noise level [1, n, 2 token_s].
    """

    layout: PairLayout
    shard: AtomShard
    q: Tensor
    encoder: AtomStack
    decoder: AtomStack
    token_bias: tuple[Tensor, ...]
    single: Tensor


class DiffusionModule(TiledModule):
    """The score model on token shards and atom windows. AlphaFold 3, Algorithm 20."""

    def prepare(
        self,
        conditioning: Conditioning,
        s_inputs: Tensor,
        s_trunk: Tensor,
        feats: Feats,
        layout: PairLayout,
        atom_layout: AtomLayout,
    ) -> Prepared:
        """Compute once what no sampling step changes.

        Args:
            conditioning: of the same layouts.
            s_inputs: this rank's shard [1, n, token_s].
            s_trunk: [1, n, token_s].
            feats: collated compact features.
            layout: the tiling.
            atom_layout: the shards of windows.

        Returns:
            What `condition` and `forward` take.

        Raises:
            ValueError: `atom_layout` does not fit the features or the mesh.
        """
        encoder, decoder = self.atom_attention_encoder, self.atom_attention_decoder
        depth = max(len(conditioning.atom_enc_bias), len(conditioning.atom_dec_bias))
        c = wide(conditioning.c)
        conditioner = self.single_conditioner
        s = torch.cat([wide(s_trunk), wide(s_inputs)], -1)
        return Prepared(
            layout=layout,
            shard=atom_shard(feats, layout, atom_layout, self.mesh, depth),
            q=wide(conditioning.q),
            encoder=atom_stack(encoder.atom_encoder, c, conditioning.atom_enc_bias),
            decoder=atom_stack(decoder.atom_decoder, c, conditioning.atom_dec_bias),
            token_bias=tuple(conditioning.token_bias),
            single=conditioner.single_embed(conditioner.norm_single(s)),
        )

    def embed_times(self, times: Tensor) -> Tensor:
        """Embed noise levels: [T] -> [T, 2 token_s]. AlphaFold 3, Algorithm 22."""
        conditioner = self.single_conditioner
        waves = torch.cos(2 * pi * conditioner.fourier_embed.proj(times[:, None]))
        return conditioner.fourier_to_single(conditioner.norm_fourier(waves))

    def condition(self, prepared: Prepared, time: Tensor) -> Tensor:
        """Compute the single conditioning of one step.

        Args:
            prepared: what the steps share.
            time: embedding of the step's noise level [2 token_s].

        Returns:
            [1, n, 2 token_s], for all samples: they share the noise level.

        Source: AlphaFold 3 supplement, Algorithm 21.
        """
        s = prepared.single + time
        with products_in(self.mesh.policy.tokens, s.device.type):
            for transition in self.single_conditioner.transitions:
                s = s + swiglu(s, transition_weights(transition))
        return s

    def forward(self, prepared: Prepared, r_noisy: Tensor, s: Tensor) -> Tensor:
        """Compute the update of the coordinates.

        Args:
            prepared: what the steps share.
            r_noisy: scaled noisy coordinates of all atoms [M, A, 3], the same on every rank.
            s: this step's conditioning [1, n, 2 token_s].

        Returns:
            [M, A, 3] on every rank.

        Source: AlphaFold 3 supplement, Algorithm 20.
        """
        return self.with_tokens(prepared, r_noisy, s)[0]

    def with_tokens(self, prepared: Prepared, r_noisy: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Run `forward`, and also return the token activations of the update [M, n, 2 token_s].

        Args:
            prepared: what the steps share.
            r_noisy: scaled noisy coordinates [M, A, 3].
            s: conditioning of the step.
        """
        shard, encoder, policy = prepared.shard, self.atom_attention_encoder, self.mesh.policy
        device, (lo, hi) = r_noisy.device.type, shard.own
        q = prepared.q + encoder.r_to_q_trans(shard.cut(r_noisy))
        with products_in(policy.atoms, device):
            q = atom_transformer(prepared.encoder, q)
            linear, _ = encoder.atom_to_token_trans  # and a ReLU, in place here: it is the peak
            a = shard.to_tokens(wide(linear(q[:, lo:hi])).relu_())
        with products_in(policy.tokens, device):
            a = a + self.s_to_a_linear(s)
            a = token_transformer(
                self.token_transformer.layers, a, s, prepared.token_bias, prepared.layout, self.mesh
            )
        decoder = self.atom_attention_decoder
        a = self.a_norm(a)
        with products_in(policy.atoms, device):
            # Projected before it travels: atom_s channels instead of 2 token_s.
            to_atoms = shard.from_tokens(wide(decoder.a_to_q_trans(a)))
            q = atom_transformer(prepared.decoder, shard.with_halo(q) + to_atoms)
        return shard.gather_atoms(decoder.atom_feat_to_atom_pos_update(q[:, lo:hi])), a
