"""Put tiled modules into a loaded Boltz-2, in place, and run its predictions on the mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from foldcp.boltz.families import boltz2_options as options
from foldcp.boltz.families.common import SwapReport, check_unswapped, uncompiled
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
from foldcp.modules.trunk.pair_embedding import RelativePositionEncoder
from foldcp.modules.trunk.pairformer import PairformerModule
from foldcp.modules.trunk.templates import TemplateModule, TemplateV2Module


def _sampler(twin: Any, mesh: Mesh) -> AtomDiffusion:
    twin.score_model = uncompiled(twin.score_model)
    return AtomDiffusion(twin, mesh, options.sampler(twin))


_SWAPS: dict[str, Callable[[nn.Module, Mesh], nn.Module]] = {
    "rel_pos": lambda x, mesh: RelativePositionEncoder(x, mesh, options.relative_position(x)),
    "input_embedder": lambda x, mesh: InputEmbedder(x, mesh, options.input_embedder(x)),
    "msa_module": MSAModule,
    "pairformer_module": PairformerModule,
    "distogram_module": lambda x, mesh: DistogramModule(x, mesh, options.distogram(x)),
    "diffusion_conditioning": lambda x, mesh: DiffusionConditioning(
        x, mesh, options.diffusion_conditioning(x)
    ),
    "structure_module": _sampler,
    "confidence_module": lambda x, mesh: ConfidenceModule(x, mesh, options.confidence(x)),
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
