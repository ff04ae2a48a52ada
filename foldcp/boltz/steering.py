"""Boltz's steering potentials behind the sampler's `Steering` protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from boltz.model.potentials.potentials import get_potentials
from torch import Tensor

from foldcp.boltz.dense import dense_view

Features = dict[str, Any]


def steering_factory(
    args: Mapping[str, Any] | None,
) -> Callable[[Features, torch.device], BoltzSteering | None] | None:
    """Make the function that prepares the steering of one sample.

    Args:
        args: Boltz's steering_args, None for no steering at all.

    Returns:
        A function of (compact features, device), or None when the arguments switch all off. It
        gives None for a sample to which no potential applies: stock would add zeros at each step.
    """
    if args is None:
        return None
    if not any(
        args[k] for k in ("fk_steering", "physical_guidance_update", "contact_guidance_update")
    ):
        return None

    def make(feats: Features, device: torch.device) -> BoltzSteering | None:
        steering = BoltzSteering(args, feats)
        return steering if steering.resample or steering.potentials else None

    return make


class BoltzSteering:
    """Stock potentials over one sample; see `foldcp.modules.steering.Steering`.

    Args:
        args: Boltz's steering_args. feats: compact features, collated.
    """

    def __init__(self, args: Mapping[str, Any], feats: Features) -> None:
        self.resample = bool(args["fk_steering"])
        self.guide = bool(args["physical_guidance_update"] or args["contact_guidance_update"])
        self.num_particles = args["num_particles"] if self.resample else 1
        self.resampling_interval = args["fk_resampling_interval"]
        self.strength = args["fk_lambda"]
        self._gradient_steps = args["num_gd_steps"]
        view = dense_view(feats)
        # Potentials read the same few dense features at every step: build these once.
        self._feats = _Remembered(view)
        self.potentials = [p for p in get_potentials(args, boltz2=True) if self._applies(p)]
        self.guide = self.guide and bool(self.potentials)

    def _applies(self, potential: Any) -> bool:
        """True unless the potential has nothing to act on in this sample."""
        name = type(potential).__name__
        if name == "ContactPotentital":  # Boltz's spelling
            return self._feats["contact_pair_index"].shape[-1] > 0
        if name == "TemplateReferencePotential":
            return "template_force" in self._feats and bool(self._feats["template_force"].any())
        return True

    def energy(self, coords: Tensor, time: float) -> Tensor:
        """Weighted energy of each sample, coords [M, A, 3] -> [M]."""
        total = torch.zeros(coords.shape[0], device=coords.device, dtype=coords.dtype)
        for potential in self.potentials:
            parameters = potential.compute_parameters(time)
            if parameters["resampling_weight"] > 0:
                value = potential.compute(coords, self._feats, parameters)
                total += parameters["resampling_weight"] * value
        return total

    def guidance(self, coords: Tensor, time: float) -> Tensor:
        """Sum of all gradient steps on the denoised coordinates, [M, A, 3]."""
        update = torch.zeros_like(coords)
        for step in range(self._gradient_steps):
            gradient = torch.zeros_like(coords)
            for potential in self.potentials:
                parameters = potential.compute_parameters(time)
                weight = parameters["guidance_weight"]
                if weight > 0 and step % parameters["guidance_interval"] == 0:
                    gradient += weight * potential.compute_gradient(
                        coords + update, self._feats, parameters
                    )
            update = update - gradient
        return update


class _Remembered(dict):
    """A mapping that keeps what it read once from another mapping."""

    def __init__(self, source: Mapping[str, Any]) -> None:
        super().__init__()
        self._source = source

    def __missing__(self, key: str) -> Any:
        self[key] = self._source[key]
        return self[key]

    def __contains__(self, key: object) -> bool:
        return key in self._source
