"""Every kind of input through the whole model on a mesh, in float64, against stock Boltz-2."""

from __future__ import annotations

from functools import lru_cache
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
from foldcp.boltz import features
from foldcp.boltz.swap import apply
from foldcp.mesh import Mesh

NAMES = ("alignments", "unforced", "nucleic", "modified", "template", "tiny")
SETTINGS = {"steps": 20, "samples": 1, "recycling": 1}
POTENTIALS = {"fk_steering": True, "physical_guidance_update": True, "num_gd_steps": 3}
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
        features.install(data)
    seed_everything(0, verbose=False)
    return collate([data[0]])


def predict(mesh: Mesh, folder: Path, names: tuple[str, ...], steering: dict) -> dict[str, Any]:
    out = {}
    for name in names:
        model = parity.build_model(dtype=torch.float64, steering=steering)
        apply(model, mesh)
        out[name] = parity.stock_outputs(model, feats(folder, name, True), **SETTINGS)
    return out


@lru_cache
def stock(folder: Path, name: str, potentials: bool) -> dict[str, Any]:
    steering = POTENTIALS if potentials else {}
    model = parity.build_model(dtype=torch.float64, steering=steering)
    return parity.stock_outputs(model, feats(folder, name, False), **SETTINGS)


def check(got: dict[str, Any], want: dict[str, Any], name: str) -> None:
    got, want = ({k: v for k, v in x.items() if k != "z"} for x in (got, want))
    # One token has no pair: stock's 0 / 0 must be ours too.
    empty = [k for k, v in want.items() if isinstance(v, torch.Tensor) and v.isnan().all()]
    assert all(got[k].isnan().all() for k in empty), f"{name}: {empty}"
    got, want = ({k: v for k, v in x.items() if k not in empty} for x in (got, want))
    away = {k: e for k, e in parity.largest_differences(got, want).items() if e > TOLERANCE}
    assert not away, f"{name}: {away}"


@pytest.mark.parametrize("rows,cols", [(1, 1), (2, 2), (3, 1)])
def test_every_kind_of_input(folder: Path, rows: int, cols: int) -> None:
    names = NAMES if rows == cols else NAMES[-2:]
    got = run(rows, cols, predict, folder, names, {})[0]
    for name in names:
        check(got[name], stock(folder, name, False), name)


def test_potentials(folder: Path) -> None:
    names = ("unforced", "nucleic")
    got = run(1, 2, predict, folder, names, POTENTIALS)[0]
    for name in names:
        check(got[name], stock(folder, name, True), name)
