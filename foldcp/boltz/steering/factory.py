"""Boltz's steering potentials behind the sampler's `Steering` protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from boltz.model.potentials.potentials import get_potentials
from boltz.model.potentials.schedules import ParameterSchedule
from torch import Tensor

from foldcp.boltz.steering import potentials
from foldcp.boltz.steering.overlap import overlap
from foldcp.boltz.steering.terms import Term

Features = dict[str, Any]

# By the name of stock's class, whose parameters and order are kept.
_PREPARE: dict[str, Callable[..., Term | None]] = {
    "SymmetricChainCOMPotential": potentials.chain_centres,
    "VDWOverlapPotential": overlap,
    "ConnectionsPotential": potentials.connections,
    "PoseBustersPotential": potentials.ligand_bounds,
    "ChiralAtomPotential": potentials.chiral_atoms,
    "StereoBondPotential": potentials.stereo_bonds,
    "PlanarBondPotential": potentials.planar_bonds,
    "ContactPotentital": potentials.contacts,  # Boltz's spelling
    "TemplateReferencePotential": potentials.templates,
}


def steering_factory(
    args: Mapping[str, Any] | None, boltz2: bool = True
) -> Callable[[Features, torch.device], BoltzSteering | None] | None:
    """Make the function that prepares the steering of one sample.

    Args:
        args: Boltz's steering_args, None for no steering at all.
        boltz2: the model is a Boltz-2; Boltz-1 has no contact guidance.

    Returns:
        A function of (compact features, device), or None when the arguments switch all off. It
        gives None for a sample to which no potential applies: stock would add zeros at each step.
    """
    if args is None:
        return None
    args = {**args, "contact_guidance_update": boltz2 and args["contact_guidance_update"]}
    if not any(
        args[k] for k in ("fk_steering", "physical_guidance_update", "contact_guidance_update")
    ):
        return None

    def make(feats: Features, device: torch.device) -> BoltzSteering | None:
        steering = BoltzSteering(args, feats, device, boltz2)
        return steering if steering.resample or steering.guide else None

    return make


class BoltzSteering:
    """Boltz's potentials over one sample; see `foldcp.modules.diffusion.particles.Steering`.

    Args:
        args: Boltz's steering_args.
        feats: compact features, collated.
        device: of the coordinates.
        boltz2: whose potentials.

    Raises:
        ValueError: Boltz has a potential that foldcp does not know.
    """

    def __init__(
        self, args: Mapping[str, Any], feats: Features, device: torch.device, boltz2: bool = True
    ) -> None:
        self.resample = bool(args["fk_steering"])
        self.num_particles = args["num_particles"] if self.resample else 1
        self.resampling_interval = args["fk_resampling_interval"]
        self.strength = args["fk_lambda"]
        self._gradient_steps = args["num_gd_steps"]
        feats = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in feats.items()}
        used = ("guidance_weight", "resampling_weight") if self.resample else ("guidance_weight",)
        # (stock's potential, for its schedules; what it does to this sample)
        self.terms: list[tuple[Any, Term]] = []
        for stock in get_potentials(args, boltz2=boltz2):
            name = type(stock).__name__
            if name not in _PREPARE:
                raise ValueError(
                    f"Boltz's potential {name} is unknown; foldcp expects those of boltz 2.2: run "
                    "without --use_potentials or install boltz 2.2.1"
                )
            if any(_ever_positive(stock.parameters[weight]) for weight in used):
                term = _PREPARE[name](feats, stock.parameters)
                self.terms += [] if term is None else [(stock, term)]
        self.guide = self._gradient_steps > 0 and any(
            _ever_positive(stock.parameters["guidance_weight"]) for stock, _ in self.terms
        )

    def energy(self, coords: Tensor, time: float) -> Tensor:
        """Return the weighted energy of each sample, coords [M, A, 3] -> [M].

        Args:
            coords: denoised coordinates [M, A, 3], angstrom.
            time: of the step, 1 at the start and 0 at the end.

        Returns:
            The energies [M].
        """
        total = coords.new_zeros(coords.shape[0])
        for stock, term in self.terms:
            parameters = stock.compute_parameters(time)
            if parameters["resampling_weight"] > 0:
                total += parameters["resampling_weight"] * term.energy(coords, parameters)
        return total

    def guidance(self, coords: Tensor, time: float) -> Tensor:
        """Sum of all gradient steps on the denoised coordinates, [M, A, 3].

        Args:
            coords: denoised coordinates [M, A, 3], angstrom.
            time: of the step, 1 at the start and 0 at the end.

        Returns:
            The sum [M, A, 3].
        """
        active = [(term, stock.compute_parameters(time)) for stock, term in self.terms]
        active = [(term, p) for term, p in active if p["guidance_weight"] > 0]
        update = torch.zeros_like(coords)
        for step in range(self._gradient_steps if active else 0):
            gradient = torch.zeros_like(coords)
            for term, parameters in active:
                if step % parameters["guidance_interval"] == 0:
                    moved = term.gradient(coords + update, parameters)
                    gradient += parameters["guidance_weight"] * moved
            update = update - gradient
        return update


def _ever_positive(weight: Any) -> bool:
    return isinstance(weight, ParameterSchedule) or weight > 0
