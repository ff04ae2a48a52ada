"""Say how a Boltz-2 predicts on the mesh: its tiled modules, its parts, its prediction dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from boltz.model.models.boltz2 import Boltz2
from boltz.model.modules import trunkv2 as stock
from torch import nn

from foldcp.boltz.families import boltz2_options as options
from foldcp.boltz.families.family import ModelFamily, Tiled, stock_names, uncompiled
from foldcp.boltz.lightning.data import RootDataModule
from foldcp.boltz.steering.factory import steering_factory
from foldcp.fabric.mesh import Mesh
from foldcp.modules.confidence.distogram import DistogramModule
from foldcp.modules.confidence.module import ConfidenceModule
from foldcp.modules.diffusion.conditioning import DiffusionConditioning
from foldcp.modules.diffusion.sampler import AtomDiffusion
from foldcp.modules.hooks import Folded
from foldcp.modules.model import FoldOnMesh
from foldcp.modules.settings import Parts
from foldcp.modules.trunk.input_embedder import InputEmbedder
from foldcp.modules.trunk.msa import MSAModule
from foldcp.modules.trunk.pair_embedding import RelativePositionEncoder
from foldcp.modules.trunk.pairformer import PairformerModule
from foldcp.modules.trunk.templates import TemplateModule, TemplateV2Module


def _sampler(twin: Any, mesh: Mesh) -> AtomDiffusion:
    twin.score_model = uncompiled(twin.score_model)
    return AtomDiffusion(twin, mesh, options.sampler(twin))


def _confidence(twin: Any, mesh: Mesh) -> ConfidenceModule:
    return ConfidenceModule(twin, mesh, options.confidence(twin))


_ALWAYS: dict[str, Tiled] = {
    "rel_pos": lambda x, mesh: RelativePositionEncoder(x, mesh, options.relative_position(x)),
    "input_embedder": lambda x, mesh: InputEmbedder(x, mesh, options.input_embedder(x)),
    "msa_module": lambda x, mesh: MSAModule(x, mesh, options.msa(x)),
    "pairformer_module": PairformerModule,
    "distogram_module": lambda x, mesh: DistogramModule(x, mesh, options.distogram(x)),
    "diffusion_conditioning": lambda x, mesh: DiffusionConditioning(
        x, mesh, options.diffusion_conditioning(x)
    ),
    "structure_module": _sampler,
}
_TEMPLATES: dict[type[nn.Module], type[TemplateV2Module]] = {
    stock.TemplateModule: TemplateModule,
    stock.TemplateV2Module: TemplateV2Module,
}
_SCORES = ("plddt", "complex_plddt", "complex_iplddt", "complex_pde", "complex_ipde")
_WITH_PAE = ("ptm", "iptm", "ligand_iptm", "protein_iptm", "pair_chains_iptm")


def _parts(model: Any) -> Parts:
    return Parts(
        confidence=model.confidence_prediction,
        templates=model.use_templates,
        bfactor=model.predict_bfactor,
        bond_types=model.bond_type_feature,
        contacts=options.contacts(model.contact_conditioning),
    )


def _check(model: Any) -> None:
    if model.affinity_prediction:
        raise ValueError("`model` is an affinity model: it runs as stock on one rank")


def _swaps(parts: Parts) -> dict[str, Tiled]:
    swaps = dict(_ALWAYS)
    if parts.confidence:
        swaps["confidence_module"] = _confidence
    if parts.templates:
        swaps["template_module"] = _template_module
    return swaps


def _template_module(twin: nn.Module, mesh: Mesh) -> nn.Module:
    return _TEMPLATES[type(twin)](twin, mesh, options.template(twin))


def _prediction(model: Any, folded: Folded) -> dict[str, Any]:
    args: Mapping[str, Any] = model.predict_args
    feats, out = folded.feats, stock_names(folded.outputs)
    pred: dict[str, Any] = {"exception": False}
    pred |= {key: feats[key] for key in args.get("keys_dict_batch", ())}
    pred["masks"], pred["token_masks"] = feats["atom_pad_mask"], feats["token_pad_mask"]
    pred["s"] = out["s"]
    if "z" in out:
        pred["z"] = out["z"]
    pred |= {key: out[key] for key in args.get("keys_dict_out", ())}
    pred["coords"] = out["sample_atom_coords"]
    if not model.confidence_prediction:
        return pred
    pred["confidence_score"] = out["confidence_score"]
    with_pae = model.alpha_pae > 0
    pred |= {key: out[key] for key in (_SCORES + _WITH_PAE if with_pae else _SCORES)}
    matrices = ("pde", "pae") if with_pae else ("pde",)
    return pred | {key: out[key] for key in matrices if key in out}


BOLTZ2 = ModelFamily(
    name="Boltz-2",
    stock=Boltz2,
    data_module=RootDataModule,
    precisions=("fp32", "bf16"),
    parts=_parts,
    affinity=lambda model: model.affinity_prediction,
    check=_check,
    swaps=_swaps,
    fold=FoldOnMesh,
    steering=lambda model: steering_factory(model.steering_args),
    errors=lambda args: ("pae", "pde"),
    prediction=_prediction,
)
