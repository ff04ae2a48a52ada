"""Steering of the sampler by potentials: guidance of the coordinates, resampling of particles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from foldcp.fabric.mesh import Mesh
from foldcp.modules.diffusion.noise import NoiseStep
from foldcp.modules.from_root import from_root


class Steering(Protocol):
    """Potentials as the sampler sees them; `time` runs from 1 at the first step to 0.

    Attributes:
        resample: weigh and redraw particles by their energy (Boltz's `fk_steering`).
        guide: move the denoised coordinates (Boltz's physical or contact guidance).
        num_particles: particles per returned sample; 1 without resampling.
        resampling_interval: steps between two redraws (Boltz's `fk_resampling_interval`).
        strength: factor on the energy in the weights (Boltz's `fk_lambda`).
    """

    resample: bool
    guide: bool
    num_particles: int
    resampling_interval: int
    strength: float

    def energy(self, coords: Tensor, time: float) -> Tensor:
        """Sum the weighted energies of denoised coordinates [M, A, 3]: [M].

        Args:
            coords: denoised coordinates [M, A, 3], angstrom.
            time: of the step, 1 at the start and 0 at the end.
        """

    def guidance(self, coords: Tensor, time: float) -> Tensor:
        """Sum what all gradient steps of one sampling step add to the coordinates: [M, A, 3].

        Args:
            coords: denoised coordinates [M, A, 3], angstrom.
            time: of the step, 1 at the start and 0 at the end.
        """


class Particles:
    """State of the steered samples between sampling steps.

    After a step that redrew particles, `taken` [M] says which; None when all went on.

    Potentials sum with atomics on a GPU, so ranks could differ in the last bit and then redraw
    different particles: only rank 0 evaluates them, and all take its numbers. The others would
    wait in any case; to share the work would cost an exchange in each gradient step.

    Args:
        steering: the potentials.
        coords: [M, A, 3], gives shape and device.
        step_scale: of the sampler.
        mesh: the mesh.

    Source: Boltz-1x (Wohlwend et al. 2024), Feynman-Kac steering (Singhal et al. 2025).
    """

    def __init__(self, steering: Steering, coords: Tensor, step_scale: float, mesh: Mesh) -> None:
        self._steering, self._step_scale, self._mesh = steering, step_scale, mesh
        self._energies = coords.new_empty(coords.shape[0], 0)
        self._update = torch.zeros_like(coords) if steering.guide else None
        self.taken: Tensor | None = None

    def rotate(self, rotation: Tensor) -> None:
        """Turn the last guidance with the coordinates, rotation [M, 3, 3]."""
        if self._update is not None:
            self._update = self._update @ rotation

    def steer(
        self,
        noisy: Tensor,
        denoised: Tensor,
        eps: Tensor,
        level: NoiseStep,
        step: int,
        steps: int,
    ) -> tuple[Tensor, Tensor]:
        """Guide and redraw after one call of the score model.

        Args:
            noisy: [M, A, 3].
            denoised: [M, A, 3].
            eps: the noise in `noisy`.
            level: the step's noise.
            step: its index.
            steps: their number.

        Returns:
            (noisy, denoised); after the last step one particle of each sample is left.
        """
        steering, last = self._steering, step == steps - 1
        time = 1.0 - step / steps
        redraw = steering.resample and (
            last or (step % steering.resampling_interval == 0 and level.noise_var > 0)
        )
        weights = self._weights(denoised, eps, level, time, step) if redraw else None
        self.taken = None
        if steering.guide and not last:
            update = self._from_root(lambda: steering.guidance(denoised, time), denoised)
            denoised = denoised + update
            factor = -self._step_scale * (level.sigma_next - level.t_hat) / level.t_hat
            self._update = update * factor
        if weights is None:
            return noisy, denoised
        groups, size = weights.shape
        # Drawn on every rank, so that all generators move alike.
        drawn = torch.multinomial(weights, 1 if last else size, replacement=True)
        first = size * torch.arange(groups, device=drawn.device)
        drawn = (drawn + first[:, None]).flatten()
        index = self._from_root(lambda: drawn, drawn)
        self._energies, self.taken = self._energies[index], index
        if self._update is not None:
            self._update = self._update[index]
        return noisy[index], denoised[index]

    def _weights(
        self, denoised: Tensor, eps: Tensor, level: NoiseStep, time: float, step: int
    ) -> Tensor:
        """Probability of each particle within its sample [samples, particles]."""
        energy = self._from_root(lambda: self._steering.energy(denoised, time), denoised[:, 0, 0])
        held = self._energies.shape[1]
        before = self._energies[:, -1] if held else torch.zeros_like(energy)
        self._energies = torch.cat([self._energies, energy[:, None]], 1)
        log_weight = self._steering.strength * (before - energy)
        if self._update is not None and level.noise_var > 0:
            moved = eps**2 - (eps + self._update) ** 2
            log_weight = log_weight + moved.sum(dim=(-1, -2)) / (2 * level.noise_var)
        return log_weight.view(-1, self._steering.num_particles).softmax(1)

    def _from_root(self, make: Callable[[], Tensor], like: Tensor) -> Tensor:
        return from_root(self._mesh, make, like, "steering")
