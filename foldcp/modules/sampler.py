"""The diffusion sampler: every rank holds all coordinates and draws the numbers stock draws."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import torch
from torch import Tensor, nn

from foldcp.layout import AtomLayout, PairLayout
from foldcp.mesh import Mesh
from foldcp.modules.alignment import random_augmentation, rigid_align
from foldcp.modules.atoms import Feats
from foldcp.modules.base import TiledModule
from foldcp.modules.diffusion import DiffusionModule, Prepared
from foldcp.modules.diffusion_conditioning import Conditioning
from foldcp.modules.noise import Preconditioning, noise_schedule
from foldcp.modules.steering import Particles, Steering

_SETTINGS = (
    "sigma_min",
    "sigma_max",
    "sigma_data",
    "rho",
    "num_sampling_steps",
    "gamma_0",
    "gamma_min",
    "noise_scale",
    "step_scale",
    "alignment_reverse_diff",
)


class AtomDiffusion(TiledModule):
    """The sampler around the score model. AlphaFold 3 supplement, Algorithm 18."""

    def __init__(self, twin: nn.Module, mesh: Mesh) -> None:
        super().__init__(twin, mesh)
        # A compiled score model keeps the module it was made from here.
        self.score_model = DiffusionModule(
            getattr(twin.score_model, "_orig_mod", twin.score_model), mesh
        )
        for name in _SETTINGS:
            setattr(self, name, getattr(twin, name))

    @torch.no_grad()
    def sample(
        self,
        conditioning: Conditioning,
        s_inputs: Tensor,
        s_trunk: Tensor,
        feats: Feats,
        layout: PairLayout,
        atom_layout: AtomLayout,
        num_sampling_steps: int | None = None,
        multiplicity: int = 1,
        max_parallel_samples: int | None = None,
        steering: Steering | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Sample structures.

        Args:
            conditioning: of the same layouts.
            s_inputs: this rank's shard [1, n, token_s]. s_trunk: [1, n, token_s].
            feats: collated compact features.
            layout: the tiling. atom_layout: the blocks of windows.
            num_sampling_steps: None for the model's own number.
            multiplicity: samples to return.
            max_parallel_samples: samples that the score model takes at once; None for all.
            steering: potentials that steer the samples, None for none.
            progress: called as `(steps done, steps)` after every step.

        Returns:
            Coordinates [multiplicity, A, 3] in angstrom, the same on every rank; padding atoms
            carry coordinates too, as in Boltz. The generator of the device ends where it would
            after stock's sampler.

        Raises:
            ValueError: fewer than 2 steps, or layouts that do not fit.

        Source: AlphaFold 3 supplement, Algorithm 18.
        """
        device = self.mesh.device
        steps = self.num_sampling_steps if num_sampling_steps is None else num_sampling_steps
        sigma, levels = noise_schedule(self, steps, device)
        count = multiplicity * (steering.num_particles if steering is not None else 1)
        shape = (count, feats["atom_pad_mask"].shape[1], 3)
        with torch.autocast(device.type, enabled=False):
            prepared = self.score_model.prepare(
                conditioning, s_inputs, s_trunk, feats, layout, atom_layout
            )
            scale = Preconditioning(levels, self.sigma_data, device)
            time = self.score_model.embed_times(scale.time)
            coords = sigma * torch.randn(shape, device=device)
            mask = feats["atom_pad_mask"].to(coords.dtype)
            particles = None
            if steering is not None:
                particles = Particles(steering, coords, self.step_scale, self.mesh)
            for i, level in enumerate(levels):
                rotation, shift = random_augmentation(count, coords)
                coords = (coords - coords.mean(dim=-2, keepdim=True)) @ rotation + shift
                eps = sqrt(level.noise_var) * torch.randn(shape, device=device)
                noisy = coords + eps
                r_noisy = scale.input[i] * noisy
                update = self._score(prepared, r_noisy, time[i], max_parallel_samples)
                denoised = scale.mix(i, noisy, update)
                if particles is not None:
                    particles.rotate(rotation)
                    noisy, denoised = particles.steer(noisy, denoised, eps, level, i, steps)
                if self.alignment_reverse_diff:
                    noisy = rigid_align(noisy, denoised, mask)
                direction = (noisy - denoised) / level.t_hat
                coords = noisy + self.step_scale * (level.sigma_next - level.t_hat) * direction
                if progress is not None:
                    progress(i + 1, steps)
        return coords

    def _score(
        self, prepared: Prepared, r_noisy: Tensor, time: Tensor, at_once: int | None
    ) -> Tensor:
        """The score model's update of all samples, at most `at_once` of them per call."""
        s = self.score_model.condition(prepared, time)
        count = r_noisy.shape[0]
        calls = -(-count // (at_once or count))
        return torch.cat([self.score_model(prepared, x, s) for x in r_noisy.chunk(calls)])
