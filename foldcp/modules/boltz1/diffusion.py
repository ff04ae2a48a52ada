"""Boltz-1's diffusion on tiles: its score model, and the tokens that its confidence module reads.

Boltz-1 computes the conditioned pair and the biases of all layers inside its score model, at the
first step of a structure. They depend on no step: here they are computed beforehand, by the
conditioning module of Boltz-2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import pi
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foldcp.fabric.mesh import Mesh
from foldcp.modules.atoms.encoder import AtomEncoder, AtomEncoderOptions
from foldcp.modules.base import TiledModule
from foldcp.modules.boltz1.trunk import finish_layers, pair_projections
from foldcp.modules.diffusion.conditioning import DiffusionConditioning
from foldcp.modules.diffusion.noise import NoiseStep
from foldcp.modules.diffusion.noise import SamplerOptions as SharedSamplerOptions
from foldcp.modules.diffusion.sampler import AtomDiffusion as SharedAtomDiffusion
from foldcp.modules.diffusion.sampler import SamplingStep
from foldcp.modules.diffusion.score_model import DiffusionModule as SharedDiffusionModule
from foldcp.modules.diffusion.token_transformer import conditioned_update
from foldcp_kernels.adaptive_norm import adaptive_norm, gated_residual


class CoordinateLinear(TiledModule):
    """A Linear on coordinates; its twin's further inputs are zero in Boltz-1."""

    def forward(self, r: Tensor) -> Tensor:
        """Embed noisy coordinates: [M, a, 3] -> [M, a, atom_s]."""
        return F.linear(r, self.weight[:, : r.shape[-1]])


class DiffusionModule(SharedDiffusionModule):
    """The score model on token shards and atom windows. AlphaFold 3, Algorithm 20.

    Args:
        twin: Boltz-1's DiffusionModule.
        mesh: the mesh.
        options: what the atom features are.
    """

    def __init__(self, twin: nn.Module, mesh: Mesh, options: AtomEncoderOptions) -> None:
        super().__init__(twin, mesh)
        encoder = AtomEncoder(twin.atom_attention_encoder, mesh, options)
        encoder.r_to_q_trans = CoordinateLinear(encoder.r_to_q_trans, mesh)
        self.atom_attention_encoder = encoder
        for transformer in (
            encoder.atom_encoder.diffusion_transformer,
            self.token_transformer,
            self.atom_attention_decoder.atom_decoder.diffusion_transformer,
        ):
            finish_layers(transformer)

    def conditioner(self) -> DiffusionConditioning:
        """Make the conditioner of the score model on the trunk, with this module's parameters."""
        view = nn.Module()
        view.pairwise_conditioner = self.pairwise_conditioner
        view.atom_encoder = self.atom_attention_encoder
        for name, transformer in (
            ("atom_enc_proj_z", self.atom_attention_encoder.atom_encoder.diffusion_transformer),
            ("atom_dec_proj_z", self.atom_attention_decoder.atom_decoder.diffusion_transformer),
            ("token_trans_proj_z", self.token_transformer),
        ):
            view.add_module(name, nn.ModuleList(pair_projections(transformer)))
        view.train(self.training)
        return DiffusionConditioning(view, self.mesh, None)


class OutTokenFeatUpdate(TiledModule):
    """Gathers the token activations of all sampling steps, for the confidence module."""

    def embed_times(self, times: Tensor) -> Tensor:
        """Embed noise levels, and normalise: [T] -> [T, C]."""
        return self.norm_fourier(torch.cos(2 * pi * self.fourier_embed.proj(times[:, None])))

    def forward(self, gathered: Tensor, tokens: Tensor, time: Tensor) -> Tensor:
        """Add one step.

        Args:
            gathered: of the steps before [M, n, 2 token_s].
            tokens: of this step.
            time: embedding of its noise level [C].

        Returns:
            [M, n, 2 token_s].

        Source: AlphaFold 3 supplement, Algorithm 25 (the conditioned transition).
        """
        block = self.transition_block
        s = torch.cat([gathered, time.expand(*gathered.shape[:2], -1)], -1)
        norm = block.adaln
        normal = norm.s_norm(s)
        a = self.norm_next(tokens)
        b = adaptive_norm(a, norm.s_scale(normal), norm.s_bias(normal), sigmoid=True)
        gate = block.output_projection[0](s)
        return gated_residual(gathered, gate, conditioned_update(block, b), sigmoid=True)


class FollowedStep(SamplingStep):
    """A sampling step whose token activations are gathered, see `OutTokenFeatUpdate`."""

    update: OutTokenFeatUpdate
    times: Tensor
    gathered: Tensor | None = None

    def follow(self, update: OutTokenFeatUpdate, times: Tensor) -> None:
        """Begin with nothing gathered; `times` [T, C] embeds the noise levels of the steps.

        Args:
            update: gathers the tokens of each step.
            times: embedded noise levels of the steps [T, C].
        """
        self.update, self.times, self.gathered = update, times, None

    def finished(self, step: int, taken: Tensor | None) -> None:
        """See `SamplingStep.finished`."""
        before, tokens = self.gathered, self._tokens
        if before is None:
            before = torch.zeros_like(tokens)
        if taken is not None:
            before, tokens = before[taken], tokens[taken]
        self.gathered = self.update(before, tokens, self.times[step])

    def _score(self, r_noisy: Tensor, time: Tensor) -> Tensor:
        s = self._score_model.condition(self._prepared, time)
        calls = -(-r_noisy.shape[0] // self._at_once)
        parts = [self._score_model.with_tokens(self._prepared, x, s) for x in r_noisy.chunk(calls)]
        # Kept by assignment: a recorded step writes to the same tensor again when replayed.
        update, self._tokens = (torch.cat(x) for x in zip(*parts, strict=True))
        return update


@dataclass(frozen=True)
class SamplerOptions(SharedSamplerOptions):
    """Say more of Boltz-1's sampler.

    Attributes:
        atoms: what the atom features are.
        gathers_tokens: the confidence module reads the token activations of all steps.
    """

    atoms: AtomEncoderOptions
    gathers_tokens: bool


class AtomDiffusion(SharedAtomDiffusion):
    """The sampler around the score model. AlphaFold 3 supplement, Algorithm 18.

    Args:
        twin: Boltz-1's AtomDiffusion, its score model not compiled.
        mesh: the mesh.
        options: noise levels, steps and atoms.

    Attributes:
        gathered: after `sample`, token activations of all its steps, shard [M, n, 2 token_s]; None
            when the confidence module does not read them.
    """

    options: SamplerOptions

    def __init__(self, twin: nn.Module, mesh: Mesh, options: SamplerOptions) -> None:
        super().__init__(twin, mesh, options)
        self.gathered: Tensor | None = None
        if options.gathers_tokens:
            self.out_token_feat_update = OutTokenFeatUpdate(twin.out_token_feat_update, mesh)

    def network(self, twin: nn.Module) -> DiffusionModule:
        """See `foldcp.modules.diffusion.sampler.AtomDiffusion.network`."""
        return DiffusionModule(twin, self.mesh, self.options.atoms)

    @property
    def step(self) -> type[SamplingStep]:
        """See `foldcp.modules.diffusion.sampler.AtomDiffusion.step`."""
        return FollowedStep if self.options.gathers_tokens else SamplingStep

    def _run(
        self, step: SamplingStep, coords: Tensor, levels: Sequence[NoiseStep], *rest: Any
    ) -> Tensor:
        if not isinstance(step, FollowedStep):
            return super()._run(step, coords, levels, *rest)
        update = self.out_token_feat_update
        step.follow(update, update.embed_times(self.numbers(levels).time))
        coords = super()._run(step, coords, levels, *rest)
        self.gathered = step.gathered
        return coords
