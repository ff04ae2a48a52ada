"""The diffusion sampler: every rank holds all coordinates and draws the numbers stock draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from foldcp.fabric.mesh import Mesh
from foldcp.layout.tiles import AtomLayout, PairLayout
from foldcp.modules.atoms.windows import Feats
from foldcp.modules.base import TiledModule
from foldcp.modules.diffusion.batch_size import sample_bytes, samples_at_once
from foldcp.modules.diffusion.conditioning import Conditioning
from foldcp.modules.diffusion.noise import (
    NoiseStep,
    SamplerOptions,
    Scales,
    StepNumbers,
    noise_schedule,
)
from foldcp.modules.diffusion.particles import Particles, Steering
from foldcp.modules.diffusion.score_model import DiffusionModule, Prepared
from foldcp.modules.diffusion.superposition import (
    Superposition,
    augmentation_shapes,
    rotation_matrix,
)
from foldcp.modules.from_root import normal
from foldcp.modules.graphs.step_graph import Steps, recorder


class AtomDiffusion(TiledModule):
    """The sampler around the score model. AlphaFold 3 supplement, Algorithm 18.

    Args:
        twin: Boltz's AtomDiffusion, its score model not compiled.
        mesh: the mesh.
        options: noise levels and steps.
    """

    def __init__(self, twin: nn.Module, mesh: Mesh, options: SamplerOptions) -> None:
        super().__init__(twin, mesh)
        self.options = options
        self.score_model = self.network(twin.score_model)

    def network(self, twin: nn.Module) -> DiffusionModule:
        """Return the score model on tiles, with the parameters of Boltz's."""
        return DiffusionModule(twin, self.mesh)

    @property
    def step(self) -> type[SamplingStep]:
        """The class of a step."""
        return SamplingStep

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
            s_inputs: this rank's shard [1, n, token_s].
            s_trunk: [1, n, token_s].
            feats: collated compact features.
            layout: the tiling.
            atom_layout: the shards of windows.
            num_sampling_steps: None for the model's own number.
            multiplicity: samples to return.
            max_parallel_samples: samples that the score model takes at once, None for all; fewer
                where memory is short.
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
        options = self.options
        steps = options.num_sampling_steps if num_sampling_steps is None else num_sampling_steps
        sigma, levels = noise_schedule(options, steps, self.mesh.device)
        count = multiplicity * (steering.num_particles if steering is not None else 1)
        with torch.autocast(self.mesh.device.type, enabled=False):
            prepared = self.score_model.prepare(
                conditioning, s_inputs, s_trunk, feats, layout, atom_layout
            )
            shape = (count, feats["atom_pad_mask"].shape[1], 3)
            (noise,) = normal(self.mesh, shape, like=torch.empty(0, device=self.mesh.device))
            coords = sigma * noise
            step = self._step(prepared, feats, coords, max_parallel_samples)
            particles = None
            if steering is not None:
                particles = Particles(steering, coords, options.step_scale, self.mesh)
            return self._run(step, coords, levels, particles, progress or (lambda *_: None))

    def _step(
        self, prepared: Prepared, feats: Feats, coords: Tensor, at_most: int | None
    ) -> SamplingStep:
        """Everything that the steps share; the last place that waits for the device."""
        count, atoms, _ = coords.shape
        align = None
        if self.options.alignment_reverse_diff:
            mask = feats["atom_pad_mask"].to(coords.dtype)
            align = Superposition(mask, int(mask.sum()))
        at_once = samples_at_once(count, at_most, sample_bytes(prepared, atoms), self.mesh)
        return self.step(self.score_model, prepared, align, at_once)

    def numbers(self, levels: Sequence[NoiseStep]) -> StepNumbers:
        """Return the numbers of the steps, on the mesh's device."""
        options = self.options
        return StepNumbers(levels, options.sigma_data, options.step_scale, self.mesh.device)

    def _run(
        self,
        step: SamplingStep,
        coords: Tensor,
        levels: Sequence[NoiseStep],
        particles: Particles | None,
        progress: Callable[[int, int], None],
    ) -> Tensor:
        """All steps, from the first noise [M, A, 3] to coordinates. Only potentials may sync."""
        numbers = self.numbers(levels)
        times = self.score_model.embed_times(numbers.time)
        unique = step.align is None or step.align.unique
        shape = tuple(coords.shape)
        with Steps(self.mesh, step, recorder(self.mesh, particles is not None, unique)) as run:
            for i, level in enumerate(levels):
                drawn = normal(self.mesh, *augmentation_shapes(len(coords)), shape, like=coords)
                given = (coords, *drawn, numbers.rows[i], times[i])
                if particles is None:
                    coords = run(*given)
                else:
                    coords = step(*given, partial(_steer, particles, level, i, len(levels)))
                step.finished(i, None if particles is None else particles.taken)
                progress(i + 1, len(levels))
            return run.finish(coords)


class SamplingStep:
    """One step of the sampler, a function of its arguments and of what does not change.

    Args:
        score_model: the network.
        prepared: what its calls share.
        align: moves the noisy coordinates onto the denoised ones, None for none.
        at_once: samples that the network takes per call.
    """

    def __init__(
        self,
        score_model: DiffusionModule,
        prepared: Prepared,
        align: Superposition | None,
        at_once: int,
    ) -> None:
        self._score_model, self._prepared, self._at_once = score_model, prepared, at_once
        self.align = align

    def __call__(
        self,
        coords: Tensor,
        quaternion: Tensor,
        shift: Tensor,
        eps: Tensor,
        row: Tensor,
        time: Tensor,
        steer: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Take the coordinates from one noise level to the next.

        Args:
            coords: [M, A, 3] in angstrom.
            quaternion: [M, 4].
            shift: [M, 1, 3].
            eps: standard normal [M, A, 3].
            row: of `StepNumbers.rows`.
            time: its embedding.
            steer: `(rotation, noisy, denoised, noise) -> (noisy, denoised)`, may redraw samples.

        Returns:
            [M, A, 3].

        Source: AlphaFold 3 supplement, Algorithm 18.
        """
        scale = Scales(*row.unbind())
        rotation = rotation_matrix(quaternion)
        coords = (coords - coords.mean(dim=-2, keepdim=True)) @ rotation + shift
        noise = scale.noise * eps
        noisy = coords + noise
        denoised = scale.skip * noisy + scale.out * self._score(scale.input * noisy, time)
        if steer is not None:
            noisy, denoised = steer(rotation, noisy, denoised, noise)
        if self.align is not None:
            noisy = self.align(noisy, denoised)
        return noisy + scale.move * ((noisy - denoised) / scale.sigma)

    def finished(self, step: int, taken: Tensor | None) -> None:
        """Note the end of a step; `taken` [M] are the samples that it redrew, None for all.

        Args:
            step: index of the step.
            taken: samples that it redrew [M], None for all in their order.
        """

    def _score(self, r_noisy: Tensor, time: Tensor) -> Tensor:
        """The score model's update of all samples."""
        s = self._score_model.condition(self._prepared, time)
        calls = -(-r_noisy.shape[0] // self._at_once)
        parts = [self._score_model(self._prepared, x, s) for x in r_noisy.chunk(calls)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _steer(
    particles: Particles,
    level: NoiseStep,
    step: int,
    steps: int,
    rotation: Tensor,
    noisy: Tensor,
    denoised: Tensor,
    noise: Tensor,
) -> tuple[Tensor, Tensor]:
    particles.rotate(rotation)
    return particles.steer(noisy, denoised, noise, level, step, steps)
