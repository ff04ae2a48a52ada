"""Predictions with random results, and how a model hands them to the writer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from foldcp.boltz.lightning.writers import RootWriter
from foldcp.boltz.run import current
from foldcp.errors import InputLost
from foldcp.modules.hooks import Folded, Outputs

if TYPE_CHECKING:
    from parity import Prepared

N, SAMPLES, CHANNELS = 67, 3, 8
RANKED = torch.tensor([0.3, 0.9, 0.5])  # the second sample is the best


def inputs_of(prepared: Prepared) -> SimpleNamespace:
    """One processed input: its features, and the folder of its structure."""
    from parity import compact_features

    return SimpleNamespace(
        features=compact_features(prepared), structures=prepared.processed / "structures"
    )


def make(inputs: SimpleNamespace, name: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """(batch, prediction) with random results of one input, that asks for its affinity too."""
    from boltz.data.types import AffinityInfo

    batch = dict(inputs.features)
    record = replace(batch["record"][0], affinity=AffinityInfo(chain_id=0, mw=100.0))
    batch["record"] = [replace(record, id=name or record.id)]
    g = torch.Generator().manual_seed(5)
    atoms = batch["atom_pad_mask"].shape[1]

    def score() -> torch.Tensor:
        return torch.rand(SAMPLES, generator=g)

    scores = ("ptm", "iptm", "ligand_iptm", "protein_iptm", "complex_plddt", "complex_iplddt")
    prediction: dict[str, Any] = {name: score() for name in (*scores, "complex_pde")}
    prediction["complex_ipde"] = score()
    prediction |= {
        "exception": False,
        "masks": batch["atom_pad_mask"],
        "coords": 30 * torch.randn((SAMPLES, atoms, 3), generator=g),
        "plddt": torch.rand((SAMPLES, N), generator=g),
        "pae": 30 * torch.rand((SAMPLES, N, N), generator=g),
        "pde": 30 * torch.rand((SAMPLES, N, N), generator=g),
        "s": torch.randn((1, N, 6), generator=g),
        "z": torch.randn((1, N, N, CHANNELS), generator=g),
        "confidence_score": RANKED.clone(),
        "pair_chains_iptm": {0: {0: score(), 1: score()}, 1: {0: score(), 1: score()}},
    }
    return batch, prediction


def send(writer: RootWriter, prediction: dict[str, Any], name: str, upto: int = N) -> bool:
    """Stream the matrices of a prediction as a model does; False when the disk has no room."""
    sizes = {(key, m): N * N for key in ("pae", "pde") for m in range(SAMPLES)}
    if "z" in prediction:
        sizes["z", 0] = N * N * CHANNELS
    try:
        sink = writer.open_outputs(name, sizes)
    except InputLost as lost:
        current().failed[name] = str(lost)
        return False
    found: dict[str, Any] = {key: prediction.pop(key) for key in ("pae", "pde")}
    if "z" in prediction:
        for lo in range(0, N, 7):
            sink.rows("z", 0, lo, found.setdefault("z", prediction["z"])[0, lo : lo + 7])
        del prediction["z"]
    for sample in range(SAMPLES):
        for lo in range(0, upto, 7):
            for key in ("pae", "pde"):
                sink.rows(key, sample, lo, found[key][sample, lo : lo + 7])
    prediction["sink"] = sink
    return True


def writer_of(inputs: SimpleNamespace, folder: Path, **options: Any) -> RootWriter:
    made = RootWriter(inputs.structures, folder / "predictions", boltz2=True, **options)
    made.on_predict_start(None, SimpleNamespace())
    return made


def write(writer: Any, prediction: dict[str, Any], batch: dict[str, Any]) -> None:
    """Hand a prediction over, and what `send` left in it; to a writer of stock's as stock does."""
    if isinstance(writer, RootWriter) and not prediction["exception"]:
        folded = Folded(batch, Outputs(*[torch.zeros(0)] * 2), prediction.pop("sink", None))
        writer.hand_over(batch["record"][0].id, folded, prediction)
    else:
        writer.write_on_batch_end(None, None, prediction, [0], batch, 0, 0)
