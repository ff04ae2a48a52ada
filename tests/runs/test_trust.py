"""Files of a results folder are loaded as data; what is in them is never run."""

from __future__ import annotations

import inspect
import os
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from alone import prediction
from boltz.data import mol, types
from boltz.data.feature import featurizerv2
from boltz.data.module import inference, inferencev2
from boltz.data.msa import mmseqs2
from boltz.data.parse import mmcif, mmcif_with_constraints, schema
from boltz.main import process_inputs
from boltz_inputs import OTHER, PROTEIN, protein, random_a3m, write_template
from rdkit import Chem

from foldcp.boltz.inputs import answers, trust
from foldcp.modules.settings import Settings
from foldcp.output.folders import Outputs
from foldcp.output.trunk_keeper import TrunkKeeper
from foldcp.runtime.files.names import Unsafe, check

INSTALLED = [
    (types.NumpySerializable, "load"), (types.JSONSerializable, "load"), (types.Manifest, "load"),
    (inferencev2, "pickle"), (inferencev2, "load_input"), (inference, "load_input"),
    (featurizerv2, "get_symmetries"), (mmseqs2, "tarfile"),
    *((module, "load_molecules") for module in (mol, inferencev2, mmcif, mmcif_with_constraints,
                                                schema)),
]  # fmt: skip
NAMES = ["", ".", "..", "../x", "/x", "a/b", "a\0b", "a\nb", "\x7f", 300 * "x", None, ["x"], 7.0]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a prediction loads is checked, for one test."""
    for place, name in INSTALLED:
        monkeypatch.setattr(place, name, vars(place)[name])
    trust.install()
    answers.install()


class Evil:
    """Makes a file when it is loaded."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.made), "w")


def test_nothing_of_the_results_folder_is_run(
    tiny_cache: Path, tmp_path: Path, installed: None
) -> None:
    made, done = tmp_path / "made", tmp_path / "processed"
    a3m = random_a3m(tmp_path / "a.a3m", PROTEIN, 9, 1)
    template = write_template(tmp_path / "t.pdb", OTHER)
    lines = [protein("A", PROTEIN, a3m), protein("B", OTHER)]
    lines += ["- ligand: {id: L, smiles: 'CC(=O)Oc1ccccc1'}", "templates:", f"- pdb: {template}"]
    text = "\n".join(["version: 1", "sequences:", *lines, "  chain_id: B", ""])
    (tmp_path / "all.yaml").write_text(text)
    process_inputs(
        data=[tmp_path / "all.yaml"],
        out_dir=tmp_path,
        ccd_path=tiny_cache / "ccd.pkl",
        mol_dir=tiny_cache / "mols",
        msa_server_url="",
        msa_pairing_strategy="greedy",
        boltz2=True,
    )

    def load() -> Any:
        return inferencev2.load_input(
            types.Record.load(done / "records" / "all.json"),
            done / "structures",
            done / "msa",
            done / "constraints",
            done / "templates",
            done / "mols",
        )

    with prediction():
        found = load()
        assert Chem.MolToSmiles(found.extra_mols["LIG1"]) == "CC(=O)Oc1ccccc1"
        assert found.structure.pocket.item() is None, "it is an array of objects"
        assert len(found.msa) == 1 and len(found.templates) == 1
        molecules, structure = done / "mols" / "all.pkl", done / "structures" / "all.npz"
        good = molecules.read_bytes()
        atoms = dict(np.load(structure, allow_pickle=True))
        objects = np.array([Evil(made)], dtype=object)
        bad = {
            "builtins.open|io.open|_io.open": pickle.dumps({"LIG1": Evil(made)}),
            "list": pickle.dumps([1]),
            "damaged data": good[: len(good) // 2],
        }
        for what, content in bad.items():
            molecules.write_bytes(content)
            with pytest.raises(trust.Refused, match=f"{re.escape(str(molecules))} .*({what})"):
                load()
        molecules.write_bytes(good)
        np.savez_compressed(structure, **{**atoms, "pocket": objects})
        with pytest.raises(trust.Refused, match=f"{re.escape(str(structure))} .*open"):
            load()
        np.savez_compressed(structure, **atoms)
        for path in (molecules, structure, done / "msa" / "all_0.npz", *done.glob("templates/*")):
            good = path.read_bytes()
            _refuse_other_kinds(path, tmp_path / "elsewhere", load)
            path.write_bytes(good)
        np.savez_compressed(structure, **{**atoms, "pocket": objects})
        assert not made.exists(), "a payload was run"
    molecules.write_bytes(pickle.dumps({"LIG1": Evil(made)}))
    np.savez_compressed(structure, **atoms)
    load()
    assert made.exists(), "the payload would not have done anything"


def _refuse_other_kinds(path: Path, elsewhere: Path, load: Callable[[], Any]) -> None:
    """A link out of the folder, a pipe and a folder in the place of a file."""
    elsewhere.write_bytes(path.read_bytes())
    for make in (lambda: path.symlink_to(elsewhere), lambda: os.mkfifo(path), path.mkdir):
        path.unlink()
        make()
        with pytest.raises(Unsafe, match=re.escape(f"{path} is not used: it ")):
            load()
        if path.is_dir():
            path.rmdir()
            path.touch()


@pytest.mark.parametrize("module", [mol, inferencev2, mmcif, mmcif_with_constraints, schema])
def test_a_residue_names_no_pickle_outside_of_the_cache(
    module: Any, tmp_path: Path, installed: None
) -> None:
    made, cache = tmp_path / "made", tmp_path / "mols"
    cache.mkdir()
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil(made)))
    (cache / "ALA.pkl").write_bytes(pickle.dumps(Chem.MolFromSmiles("C")))
    assert Chem.MolToSmiles(module.load_molecules(cache, {"ALA"})["ALA"]) == "C"
    for name in [str(tmp_path / "evil"), "../evil", "../mols/../evil", *NAMES]:
        with pytest.raises(Unsafe, match="the residue's name .* is not used"):
            module.load_molecules(cache, ["ALA", name])
    os.mkfifo(cache / "GLY.pkl")
    with pytest.raises(Unsafe, match="a pipe"):
        module.load_molecules(cache, ["GLY"])
    assert not made.exists(), "a payload was run"
    if module is mol:
        stock = inspect.unwrap(mol.load_molecules)  # other tests may have installed it, too
        stock(cache, ["../evil"])
        assert made.exists(), "the payload would not have done anything"
        with prediction(), pytest.raises(trust.Refused):
            featurizerv2.get_symmetries({})


def test_names_in_records_stay_in_their_folders(tmp_path: Path, installed: None) -> None:
    chain = types.ChainInfo(0, "A", 0, -1, "one_0", 7)
    template = types.TemplateInfo("t", "A", 0, 1, "A", 0, 1)
    record = types.Record("one", types.StructureInfo(), [chain], [], templates=[template])
    path, manifest = tmp_path / "one.json", tmp_path / "manifest.json"
    feats = {"a": torch.zeros(1), "ref_pos": torch.zeros(1)}
    with prediction() as run:
        keeper = TrunkKeeper(tmp_path / "kept", {}, run.mesh)
        outputs = Outputs(tmp_path / "predictions", lambda *_: None)

        def load(changed: types.Record) -> None:
            types.Record.dump(changed, path)
            types.Manifest([changed]).dump(manifest)
            types.Record.load(path)

        load(record)
        assert types.Manifest.load(manifest).records == [record]
        before = set(tmp_path.rglob("*"))
        for name in NAMES:
            for changed in (
                replace(record, id=name),
                replace(record, chains=[replace(chain, msa_id=name)]),
                replace(record, templates=[replace(template, name=name)]),
            ):
                for read in (lambda x=changed: load(x), lambda: types.Manifest.load(manifest)):
                    # Boltz itself refuses what is no text at all.
                    with pytest.raises(Unsafe if isinstance(name, str) else Exception):
                        read()
                for module in (inference, inferencev2):
                    with pytest.raises(Unsafe, match="is not used"):
                        module.load_input(changed, tmp_path, tmp_path)
            with pytest.raises(Unsafe):
                outputs.begin(name)
            named = SimpleNamespace(id=name)
            with pytest.raises(Unsafe):
                keeper.begin({**feats, "record": [named]}, Settings(1, 1, 1))
        assert set(tmp_path.rglob("*")) == before
        with pytest.raises(Unsafe, match="it is of another record, two"):
            load(replace(record, id="two"))
    for name in (n for n in NAMES if n not in ("..", ".", "")):
        with pytest.raises(Unsafe):
            check(name, "a name")
