"""Put tiled modules into a loaded Boltz-1, in place, and run its predictions on the mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from foldcp.boltz.families import boltz1_options as options
from foldcp.boltz.families.common import SwapReport, check_unswapped, uncompiled
from foldcp.boltz.families.predict_step import PredictStep
from foldcp.boltz.steering.factory import steering_factory
from foldcp.fabric.mesh import Mesh
from foldcp.modules.boltz1.confidence import ConfidenceModule
from foldcp.modules.boltz1.diffusion import AtomDiffusion
from foldcp.modules.boltz1.model import FoldBoltz1OnMesh
from foldcp.modules.boltz1.trunk import InputEmbedder, MSAModule, PairformerModule
from foldcp.modules.confidence.distogram import DistogramModule
from foldcp.modules.sink import MatrixSink
from foldcp.modules.trunk.pair_embedding import RelativePositionEncoder


def _sampler(twin: Any, mesh: Mesh) -> AtomDiffusion:
    twin.score_model = uncompiled(twin.score_model)
    return AtomDiffusion(twin, mesh, options.sampler(twin))


_SWAPS: dict[str, Callable[[nn.Module, Mesh], nn.Module]] = {
    "rel_pos": lambda x, mesh: RelativePositionEncoder(x, mesh, options.relative_position(x)),
    "input_embedder": lambda x, mesh: InputEmbedder(x, mesh, options.input_embedder(x)),
    "msa_module": MSAModule,
    "pairformer_module": PairformerModule,
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


def apply(model: nn.Module, mesh: Mesh, precision: str = "fp32") -> SwapReport:
    """Swap a loaded Boltz-1 in place; afterwards it predicts on the mesh.

    Args:
        model: a Boltz-1 in eval mode.
        mesh: the mesh; every rank must hold the same weights.
        precision: "fp32"; Boltz-1 runs in float32 everywhere.

    Returns:
        What was swapped.

    Raises:
        ValueError: the model is not a Boltz-1 that predicts confidence with PAE, is in training
            mode, or was swapped before.

    Source: docs/design/overview.md.
    """
    _check(model, precision)
    swapped = [name for name in _SWAPS if hasattr(model, name)]
    for name in swapped:
        setattr(model, name, _SWAPS[name](uncompiled(getattr(model, name)), mesh))
    steering = steering_factory(getattr(model, "steering_args", None), boltz2=False)
    model.foldcp = FoldBoltz1OnMesh(model, mesh, steering)
    model.predict_step = _PredictStep(model, mesh)
    return SwapReport(tuple(swapped))


def _check(model: nn.Module, precision: str) -> None:
    if precision != "fp32":
        raise ValueError(f"`precision` must be fp32 for Boltz-1, got {precision!r}")
    if type(model).__name__ != "Boltz1":
        raise ValueError(f"`model` must be a Boltz1, got {type(model).__name__}")
    check_unswapped(model)
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


class _PredictStep(PredictStep):
    """Boltz1.predict_step on the mesh: features in, stock's prediction dict on the root rank."""

    def _errors(self) -> tuple[str, ...]:
        return _matrices(self._model[0].predict_args)

    def _sink(self, sink: MatrixSink | None) -> MatrixSink | None:
        return None if sink is None else _Wanted(sink, frozenset({"z", *self._errors()}))

    @staticmethod
    def _prediction(model: nn.Module, batch: dict[str, Any], out: dict[str, Any]) -> dict[str, Any]:
        args = model.predict_args
        pred: dict[str, Any] = {"exception": False, "masks": batch["atom_pad_mask"]}
        pred["coords"], pred["s"] = out["sample_atom_coords"], out["s"]
        if "z" in out:
            pred["z"] = out["z"]
        if args.get("write_confidence_summary", True):
            iptm: Tensor = out["iptm"]
            fit = out["ptm"] if torch.allclose(iptm, torch.zeros_like(iptm)) else iptm
            pred["confidence_score"] = (4 * out["complex_plddt"] + fit) / 5
            pred |= {key: out[key] for key in _SCORES}
        return pred | {key: out[key] for key in _matrices(args) if key in out}


def _matrices(args: dict[str, Any]) -> tuple[str, ...]:
    """The N x N results that Boltz-1 hands out under these predict_args."""
    return tuple(k for k, usual in _MATRICES.items() if args.get(f"write_full_{k}", usual))


class _Wanted:
    """Passes the matrices that are wanted on to another sink, and drops the others.

    Args:
        sink: takes the rows.
        names: of the wanted matrices.
    """

    def __init__(self, sink: MatrixSink, names: frozenset[str]) -> None:
        self._sink, self._names = sink, names

    def rows(self, name: str, sample: int, lo: int, block: Tensor) -> None:
        """See `foldcp.modules.sink.MatrixSink`."""
        if name in self._names:
            self._sink.rows(name, sample, lo, block)
