"""Predict one input with a swapped model, and hand out what stock hands out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foldcp.fabric.mesh import Mesh
from foldcp.modules.settings import Settings
from foldcp.modules.sink import MatrixSink
from foldcp.output.folders import SPOOL
from foldcp.runtime.screen.progress import Progress


def settings_of(model: nn.Module) -> Settings:
    """Return the settings that `boltz predict` gave a swapped model."""
    args = model.predict_args
    return Settings(
        recycling_steps=args["recycling_steps"],
        sampling_steps=args["sampling_steps"],
        diffusion_samples=args["diffusion_samples"],
        max_parallel_samples=args.get("max_parallel_samples"),
        keep_z=getattr(model, "foldcp_write_embeddings", False),
    )


class PredictStep:
    """Boltz2.predict_step on the mesh: features in, stock's prediction dict on the root rank."""

    def __init__(self, model: nn.Module, mesh: Mesh) -> None:
        # Held in a list so that nn.Module does not register a cycle.
        self._model, self.mesh = [model], mesh

    def __call__(self, batch: dict[str, Any], batch_idx: int = 0, *_: Any) -> dict[str, Any]:
        """Predict one sample.

        Args:
            batch: compact features, collated.
            batch_idx: unused, as in stock.

        Returns:
            Stock's prediction dict on the root rank, {"exception": False} elsewhere. Matrices that
            went to disk (see foldcp.output.folders) are under `SPOOL`. With "exception": True when
            there is no room for them.
        """
        (model,) = self._model
        settings = settings_of(model)
        name = str(getattr((batch.get("record") or [None])[0], "id", "input"))
        opened, sink = self._open_sink(name, batch, settings)
        if not opened:
            return {"exception": True}
        samples, tokens = settings.diffusion_samples, batch["token_index"].shape[1]
        rated = samples if model.confidence_prediction else 0
        passes, steps = settings.recycling_steps + 1, settings.sampling_steps
        with Progress(name, tokens, passes, steps, samples, rated) as progress:
            out = model.foldcp(batch, settings, progress.update, self._sink(sink))
        if not self.mesh.is_root:
            return {"exception": False}
        pred = self._prediction(model, batch, out)
        return pred if sink is None else {**pred, SPOOL: sink}

    def _sink(self, sink: MatrixSink | None) -> MatrixSink | None:
        """Return the sink that the model sends its matrices to."""
        return sink

    def _open_sink(
        self, name: str, batch: dict[str, Any], settings: Settings
    ) -> tuple[bool, MatrixSink | None]:
        """(whether to go on, what takes the matrices; None keeps them in memory)."""
        (model,) = self._model
        open_sink = getattr(model, "foldcp_open_sink", None)  # set by the writer of a run
        if open_sink is None:
            return True, None
        channels = model.z_norm.weight.shape[0] if settings.keep_z else 0
        tokens = batch["token_index"].shape[1]
        rated = settings.diffusion_samples if model.confidence_prediction else 0
        return open_sink(name, tokens, rated, channels, self._errors())

    def _errors(self) -> tuple[str, ...]:
        """The matrices of expected errors that are handed out."""
        return ("pae", "pde")

    @staticmethod
    def _prediction(model: nn.Module, batch: dict[str, Any], out: dict[str, Any]) -> dict[str, Any]:
        args = model.predict_args
        pred: dict[str, Any] = {"exception": False}
        for key in args.get("keys_dict_batch", ()):
            pred[key] = batch[key]
        pred["masks"] = batch["atom_pad_mask"]
        pred["token_masks"] = batch["token_pad_mask"]
        pred["s"] = out["s"]
        if "z" in out:
            pred["z"] = out["z"]
        for key in args.get("keys_dict_out", ()):
            pred[key] = out[key]
        pred["coords"] = out["sample_atom_coords"]
        if model.confidence_prediction:
            _add_scores(pred, out, model.alpha_pae > 0)
        return pred


def _add_scores(pred: dict[str, Any], out: dict[str, Any], with_pae: bool) -> None:
    elsewhere = {"pae", "pde"} - out.keys()
    for key in ("pde", "plddt", "complex_plddt", "complex_iplddt", "complex_pde", "complex_ipde"):
        if key not in elsewhere:
            pred[key] = out[key]
    iptm: Tensor = out["iptm"]
    fit = out["ptm"] if torch.allclose(iptm, torch.zeros_like(iptm)) else iptm
    pred["confidence_score"] = (4 * out["complex_plddt"] + fit) / 5
    if with_pae:
        for key in ("pae", "ptm", "iptm", "ligand_iptm", "protein_iptm", "pair_chains_iptm"):
            if key not in elsewhere:
                pred[key] = out[key]
