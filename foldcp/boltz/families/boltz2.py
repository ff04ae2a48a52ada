"""Put tiled modules into a loaded Boltz-2, in place, and run its predictions on the mesh."""

from __future__ import annotations

from torch import nn

from foldcp.boltz.families.common import SwapReport, check_unswapped
from foldcp.boltz.families.predict_step import PredictStep
from foldcp.boltz.steering.factory import steering_factory
from foldcp.fabric.mesh import Mesh
from foldcp.modules.confidence.distogram import DistogramModule
from foldcp.modules.confidence.module import ConfidenceModule
from foldcp.modules.diffusion.conditioning import DiffusionConditioning
from foldcp.modules.diffusion.sampler import AtomDiffusion
from foldcp.modules.model import FoldOnMesh
from foldcp.modules.trunk.input_embedder import InputEmbedder
from foldcp.modules.trunk.msa import MSAModule
from foldcp.modules.trunk.pairformer import PairformerModule
from foldcp.modules.trunk.templates import TemplateModule, TemplateV2Module

_SWAPS = {
    "input_embedder": InputEmbedder,
    "msa_module": MSAModule,
    "pairformer_module": PairformerModule,
    "distogram_module": DistogramModule,
    "diffusion_conditioning": DiffusionConditioning,
    "structure_module": AtomDiffusion,
    "confidence_module": ConfidenceModule,
}
_TEMPLATES = {"TemplateModule": TemplateModule, "TemplateV2Module": TemplateV2Module}


def apply(model: nn.Module, mesh: Mesh, precision: str = "fp32") -> SwapReport:
    """Swap a loaded Boltz-2 in place; afterwards it predicts on the mesh.

    Args:
        model: a Boltz-2 structure model in eval mode.
        mesh: the mesh; every rank must hold the same weights.
        precision: "fp32" or "bf16" (informative: autocast is the trainer's).

    Returns:
        What was swapped.

    Raises:
        ValueError: the model is not a Boltz-2 structure model, is in training mode, or was swapped
            before.

    Source: docs/design/overview.md.
    """
    _check(model, precision)
    swapped = []
    for name, tiled in _SWAPS.items():
        if hasattr(model, name):
            setattr(model, name, tiled(getattr(model, name), mesh))
            swapped.append(name)
    if model.use_templates:
        twin = model.template_module
        model.template_module = _TEMPLATES[type(twin).__name__](twin, mesh)
        swapped.append("template_module")
    model.foldcp = FoldOnMesh(model, mesh, steering_factory(getattr(model, "steering_args", None)))
    model.predict_step = PredictStep(model, mesh)
    return SwapReport(tuple(swapped))


def _check(model: nn.Module, precision: str) -> None:
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"`precision` must be fp32 or bf16, got {precision!r}")
    if type(model).__name__ != "Boltz2":
        raise ValueError(f"`model` must be a Boltz2 or Boltz1, got {type(model).__name__}")
    check_unswapped(model)
    if model.affinity_prediction:
        raise ValueError("`model` is an affinity model: it runs as stock on one rank")
