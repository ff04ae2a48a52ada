"""Put tiled modules into a loaded model of either family."""

from __future__ import annotations

from torch import nn

from foldcp.boltz.families import boltz1, boltz2
from foldcp.boltz.families.common import SwapReport
from foldcp.fabric.mesh import Mesh


def apply(model: nn.Module, mesh: Mesh, precision: str = "fp32") -> SwapReport:
    """Swap a loaded Boltz-2 or Boltz-1 in place; afterwards it predicts on the mesh.

    Args:
        model: a structure model in eval mode.
        mesh: the mesh; every rank must hold the same weights.
        precision: "fp32", for Boltz-2 also "bf16" (informative: autocast is the trainer's).

    Returns:
        What was swapped.

    Raises:
        ValueError: the model is neither, is in training mode, or was swapped before; or the family
            does not run in this precision.

    Source: docs/design/overview.md.
    """
    family = boltz1 if type(model).__name__ == "Boltz1" else boltz2
    return family.apply(model, mesh, precision)
