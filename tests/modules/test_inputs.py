"""Every kind of input on an odd mesh, in float64, against stock Boltz-2.

On 1x1 and 2x2: tests/runs/test_predict.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import boltz_inputs
import parity
import pytest
import torch
from boltz.data.module.inferencev2 import collate
from pytorch_lightning import seed_everything
from ranks import run

from bench.synthetic.molecules import write_molecules
from foldcp.boltz.families.swap import apply
from foldcp.boltz.features import boltz2 as features
from foldcp.fabric.mesh import Mesh

NAMES = ("alignments", "unforced", "nucleic", "modified", "template", "tiny")
SETTINGS = {"steps": 20, "samples": 1, "recycling": 1}
TOLERANCE = 1e-6  # absolute; coordinates in angstrom


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inputs")
    write_molecules(path)
    boltz_inputs.process(path)
    lines = ["version: 1", "sequences:", "- ligand: {id: D, ccd: MG}"]
    (path / "tiny.yaml").write_text("\n".join(lines))
    # With untrained weights, forced contacts drive stock's own guidance to NaN.
    text = (path / "ligand.yaml").read_text().replace(", force: true", "")
    (path / "unforced.yaml").write_text(text)
    boltz_inputs.process_inputs(
        data=[path / "tiny.yaml", path / "unforced.yaml"],
        out_dir=path,
        ccd_path=path / "ccd.pkl",
        mol_dir=path / "mols",
        msa_server_url="",
        msa_pairing_strategy="greedy",
        boltz2=True,
    )
    return path


def feats(folder: Path, name: str, compact: bool) -> dict[str, Any]:
    data = boltz_inputs.dataset(folder, name)
    if compact:
        features.CompactFeaturizer.install(data)
    seed_everything(0, verbose=False)
    return collate([data[0]])


def predict(mesh: Mesh, folder: Path) -> dict[str, Any]:
    out = {}
    for name in NAMES:
        model = parity.build_model(dtype=torch.float64)
        apply(model, mesh)
        out[name] = parity.stock_outputs(model, feats(folder, name, True), **SETTINGS)
    return out


def stock(folder: Path, name: str) -> dict[str, Any]:
    model = parity.build_model(dtype=torch.float64)
    return parity.stock_outputs(model, feats(folder, name, False), **SETTINGS)


def check(got: dict[str, Any], want: dict[str, Any], name: str) -> None:
    got, want = ({k: v for k, v in x.items() if k != "z"} for x in (got, want))
    # One token has no pair: stock's 0 / 0 must be ours too.
    empty = [k for k, v in want.items() if isinstance(v, torch.Tensor) and v.isnan().all()]
    assert all(got[k].isnan().all() for k in empty), f"{name}: {empty}"
    got, want = ({k: v for k, v in x.items() if k not in empty} for x in (got, want))
    away = {k: e for k, e in parity.largest_differences(got, want).items() if e > TOLERANCE}
    assert not away, f"{name}: {away}"


def test_every_kind_of_input_on_3x1(folder: Path) -> None:
    got = run(3, 1, predict, folder)[0]
    for name in NAMES:
        check(got[name], stock(folder, name), name)
