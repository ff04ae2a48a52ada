"""Noise levels of the diffusion sampler and the numbers of its steps, with Boltz's arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class SamplerOptions:
    """Say which noise levels a sampler has and how it moves between them.

    Attributes:
        sigma_min: lowest noise level, in parts of `sigma_data`.
        sigma_max: highest noise level, in parts of `sigma_data`.
        sigma_data: standard deviation of coordinates, in angstrom.
        rho: exponent of the noise levels in between.
        gamma_0: noise that a step adds, in parts of its level.
        gamma_min: level above which a step adds noise.
        noise_scale: factor on that noise.
        step_scale: factor on the move to the next level.
        num_sampling_steps: steps where a prediction asks for no number.
        alignment_reverse_diff: noisy coordinates are moved onto the denoised ones.
    """

    sigma_min: float
    sigma_max: float
    sigma_data: float
    rho: float
    gamma_0: float
    gamma_min: float
    noise_scale: float
    step_scale: float
    num_sampling_steps: int
    alignment_reverse_diff: bool


@dataclass(frozen=True)
class NoiseStep:
    """The numbers of one sampling step, in angstrom.

    Args:
        t_hat: noise level that the score model sees.
        sigma_next: noise level afterwards.
        noise_var: variance of the noise that the step adds.
    """

    t_hat: float
    sigma_next: float
    noise_var: float


def noise_schedule(
    settings: SamplerOptions, steps: int, device: torch.device
) -> tuple[float, list[NoiseStep]]:
    """Compute the noise levels as host numbers, in float32 on the device as in Boltz.

    Args:
        settings: of the sampler.
        steps: number of sampling steps, at least 2.
        device: of the run.

    Returns:
        (standard deviation of the initial coordinates in angstrom, the steps).

    Raises:
        ValueError: fewer than 2 steps.

    Source: AlphaFold 3 supplement, Algorithm 18; Karras et al. 2022, equation 5.
    """
    if steps < 2:
        raise ValueError(
            f"`num_sampling_steps` is {steps}; the noise schedule expects at least 2: pass "
            "--sampling_steps 2 or more"
        )
    inv = 1 / settings.rho
    ramp = torch.arange(steps, device=device, dtype=torch.float32) / (steps - 1)
    first, last = settings.sigma_max**inv, settings.sigma_min**inv
    sigmas = (first + ramp * (last - first)) ** settings.rho * settings.sigma_data
    sigmas = F.pad(sigmas, (0, 1))
    gammas = torch.where(sigmas > settings.gamma_min, settings.gamma_0, 0.0)
    level, gamma = sigmas.tolist(), gammas.tolist()
    out = []
    for i in range(steps):
        t_hat = level[i] * (1 + gamma[i + 1])
        noise_var = settings.noise_scale**2 * (t_hat**2 - level[i] ** 2)
        out.append(NoiseStep(t_hat, level[i + 1], noise_var))
    return level[0], out


class StepNumbers:
    """Numbers that differ between sampling steps, on the device: one row per step.

    Args:
        steps: the sampling steps.
        sigma_data: `sigma_data` of the sampler.
        step_scale: `step_scale` of the sampler.
        device: of the run.

    Source: Karras et al. 2022, table 1; AlphaFold 3 supplement, Algorithm 18.
    """

    def __init__(
        self, steps: Sequence[NoiseStep], sigma_data: float, step_scale: float, device: torch.device
    ) -> None:
        def each(number: Callable[[NoiseStep], float]) -> Tensor:
            return torch.tensor([number(s) for s in steps], device=device)

        sigma = each(lambda s: s.t_hat)
        total = sigma**2 + sigma_data**2
        skip, out = sigma_data**2 / total, sigma * sigma_data / torch.sqrt(total)
        noise = each(lambda s: sqrt(s.noise_var))
        move = each(lambda s: step_scale * (s.sigma_next - s.t_hat))
        self.time = torch.log((sigma / sigma_data).clamp(min=1e-20)) * 0.25
        self.rows = torch.stack([noise, 1 / torch.sqrt(total), skip, out, sigma, move], 1)


class Scales(NamedTuple):
    """One row of `StepNumbers`: numbers on the device.

    `noise` scales what the step adds, `input` what the score model takes, `skip` and `out` mix its
    update in; `sigma` is the noise level, `move` the step towards the next one.
    """

    noise: Tensor
    input: Tensor
    skip: Tensor
    out: Tensor
    sigma: Tensor
    move: Tensor
