"""Say how a Boltz-1 predicts on the mesh: its tiled modules, its parts, its prediction dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from boltz.model.models.boltz1 import Boltz1

from foldcp.boltz.families import boltz1_options as options
from foldcp.boltz.families.family import ModelFamily, Tiled, stock_names, uncompiled
from foldcp.boltz.lightning.boltz1_data import RootBoltz1DataModule
from foldcp.boltz.steering.factory import steering_factory
from foldcp.fabric.mesh import Mesh
from foldcp.modules.boltz1.confidence import ConfidenceModule
from foldcp.modules.boltz1.diffusion import AtomDiffusion
from foldcp.modules.boltz1.model import FoldBoltz1OnMesh
from foldcp.modules.boltz1.trunk import InputEmbedder, MSAModule, PairformerModule
from foldcp.modules.confidence.distogram import DistogramModule
from foldcp.modules.hooks import Folded
from foldcp.modules.settings import Parts
from foldcp.modules.trunk.pair_embedding import RelativePositionEncoder


def _sampler(twin: Any, mesh: Mesh) -> AtomDiffusion:
    twin.score_model = uncompiled(twin.score_model)
    return AtomDiffusion(twin, mesh, options.sampler(twin))


_SWAPS: dict[str, Tiled] = {
    "rel_pos": lambda x, mesh: RelativePositionEncoder(x, mesh, options.relative_position(x)),
    "input_embedder": lambda x, mesh: InputEmbedder(x, mesh, options.input_embedder(x)),
    "msa_module": lambda x, mesh: MSAModule(x, mesh, options.msa(x)),
    "pairformer_module": lambda x, mesh: PairformerModule(x, mesh, options.pairformer(x)),
    "distogram_module": lambda x, mesh: DistogramModule(x, mesh, options.distogram(x)),
    "structure_module": _sampler,
    "confidence_module": lambda x, mesh: ConfidenceModule(x, mesh, options.confidence(x)),
}
_SCORES = (
    "ptm",
    "iptm",
    "ligand_iptm",
    "protein_iptm",
    "pair_chains_iptm",
    "complex_plddt",
    "complex_iplddt",
    "complex_pde",
    "complex_ipde",
    "plddt",
)
# Matrices that stock hands out, and whether it does so when nobody says.
_MATRICES = {"pae": True, "pde": False}


def _check(model: Any) -> None:
    if model.no_msa or model.input_embedder.no_atom_encoder:
        raise ValueError(
            "`model` has no MSA module or no atom encoder: foldcp runs Boltz-1 as published, which "
            "has both"
        )
    if not model.confidence_prediction or model.alpha_pae <= 0:
        # Stock's predict_step fails on it too, after the structure is computed.
        raise ValueError(
            "`model` does not predict confidence with PAE, which its predict_step returns: use a "
            "checkpoint with confidence_prediction and alpha_pae above 0"
        )


def _errors(args: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(k for k, usual in _MATRICES.items() if args.get(f"write_full_{k}", usual))


def _prediction(model: Any, folded: Folded) -> dict[str, Any]:
    args: Mapping[str, Any] = model.predict_args
    out = stock_names(folded.outputs)
    pred: dict[str, Any] = {"exception": False, "masks": folded.feats["atom_pad_mask"]}
    pred["coords"], pred["s"] = out["sample_atom_coords"], out["s"]
    if "z" in out:
        pred["z"] = out["z"]
    if args.get("write_confidence_summary", True):
        pred["confidence_score"] = out["confidence_score"]
        pred |= {key: out[key] for key in _SCORES}
    return pred | {key: out[key] for key in _errors(args) if key in out}


BOLTZ1 = ModelFamily(
    name="Boltz-1",
    stock=Boltz1,
    data_module=RootBoltz1DataModule,
    precisions=("fp32",),
    parts=lambda model: Parts(rating_trunk=model.confidence_imitate_trunk),
    affinity=lambda model: False,
    check=_check,
    swaps=lambda parts: _SWAPS,
    fold=FoldBoltz1OnMesh,
    steering=lambda model: steering_factory(model.steering_args, boltz2=False),
    errors=_errors,
    prediction=_prediction,
)
