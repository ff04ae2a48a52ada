"""Put tiled modules into a loaded model of either family, in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from foldcp.boltz.families.boltz1 import BOLTZ1
from foldcp.boltz.families.boltz2 import BOLTZ2
from foldcp.boltz.families.family import ModelFamily, uncompiled
from foldcp.boltz.families.predict_step import PredictStep
from foldcp.fabric.mesh import Mesh

FAMILIES = {family.stock: family for family in (BOLTZ2, BOLTZ1)}


@dataclass(frozen=True)
class SwapReport:
    """Attribute names of the model that were swapped."""

    swapped: tuple[str, ...]

    def summary(self) -> str:
        """Summarise the swap in one short phrase for the start line."""
        return "swapped " + ", ".join(self.swapped)


def family_of(model: nn.Module) -> ModelFamily:
    """Find the family of a model by its class or the nearest base class.

    Args:
        model: of Boltz; one that torch.compile made counts as the one that it was made from.

    Raises:
        ValueError: the model is neither a Boltz-2 nor a Boltz-1.
    """
    stock = type(uncompiled(model))
    for base in stock.__mro__:
        if base in FAMILIES:
            return FAMILIES[base]
    raise ValueError(f"`model` must be a Boltz2 or Boltz1, got {stock.__name__}")


def apply(model: nn.Module, mesh: Mesh, precision: str = "fp32") -> SwapReport:
    """Swap a loaded Boltz-2 or Boltz-1 in place; afterwards its `predict_step` uses the mesh.

    Args:
        model: a structure model in eval mode.
        mesh: the mesh; every rank must hold the same weights.
        precision: "fp32", for Boltz-2 also "bf16" (informative: autocast is the trainer's).

    Returns:
        What was swapped.

    Raises:
        ValueError: the model is neither, is in training mode, or was swapped before; or the family
            does not run in this precision, or not without a part that the model lacks.

    Source: docs/design/overview.md.
    """
    family, model = family_of(model), uncompiled(model)
    _check(model, family, precision)
    parts = family.parts(model)
    swaps = family.swaps(parts)
    # All are made before the first is put in: a part that does not fit leaves the model as it was.
    made = {
        name: tiled(uncompiled(model.get_submodule(name)), mesh) for name, tiled in swaps.items()
    }
    for name, module in made.items():
        setattr(model, name, module)
    fold = family.fold(model, mesh, parts, family.steering(model))
    model.predict_step = PredictStep(family, fold)
    return SwapReport(tuple(swaps))


def _check(model: Any, family: ModelFamily, precision: str) -> None:
    if precision not in family.precisions:
        known = " or ".join(family.precisions)
        raise ValueError(f"`precision` must be {known} for {family.name}, got {precision!r}")
    if model.training:
        raise ValueError("`model` is in training mode: call model.eval() first")
    if isinstance(model.predict_step, PredictStep):
        raise ValueError("`model` was swapped before: load it again to swap it for another mesh")
    family.check(model)
