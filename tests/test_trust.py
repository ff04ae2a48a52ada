"""Files of a results folder are loaded as data; what is in them is never run."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alone import prediction
from boltz.data import types
from boltz.data.module import inferencev2
from boltz.main import process_inputs
from boltz_inputs import OTHER, PROTEIN, protein, random_a3m, write_template
from rdkit import Chem

from foldcp.boltz import trust


class Evil:
    """Makes a file when it is loaded."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.made), "w")


def test_nothing_of_the_results_folder_is_run(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    monkeypatch.setattr(types.NumpySerializable, "load", vars(types.NumpySerializable)["load"])
    monkeypatch.setattr(inferencev2, "pickle", pickle)
    trust.install()

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
        assert not made.exists(), "a payload was run"
    load()
    assert made.exists(), "the payload would not have done anything"
