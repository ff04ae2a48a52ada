"""`foldcp compare`: superposition, lDDT, the files of Boltz, and the verdict as an exit code."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import gemmi
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from foldcp import compare, similarity
from foldcp.report import UserError

RNG = np.random.default_rng(5)
COORDS = RNG.normal(size=(40, 3)) * 8


def _write(path: Path, coords: np.ndarray) -> Path:
    """A structure of two chains, four atoms a residue."""
    structure = gemmi.Structure()
    structure.add_model(gemmi.Model("1"))
    for i, at in enumerate(coords):
        name = "A" if i < 20 else "B"
        chain = structure[0].find_chain(name) or structure[0].add_chain(gemmi.Chain(name))
        if i % 4 == 0:
            residue = gemmi.Residue()
            residue.name, residue.seqid = "ALA", gemmi.SeqId(str(i // 4 + 1))
            chain.add_residue(residue)
        atom = gemmi.Atom()
        atom.name, atom.pos = ("N", "CA", "C", "O")[i % 4], gemmi.Position(*at)
        atom.element = gemmi.Element("C")
        chain[-1].add_atom(atom)
    structure.setup_entities()
    if path.suffix == ".pdb":
        structure.write_pdb(str(path))
    else:
        structure.make_mmcif_document().write_file(str(path))
    return path


def _results(folder: Path, coords: np.ndarray, name: str = "one", off: float = 0.0) -> Path:
    at = folder / "boltz_results_x" / "predictions" / name
    at.mkdir(parents=True)
    _write(at / f"{name}_model_0.cif", coords)
    np.savez(at / f"plddt_{name}_model_0.npz", plddt=np.full(10, 0.7))
    np.savez(at / f"pae_{name}_model_0.npz", pae=np.full((10, 10), 3.0 + off))
    (at / f"confidence_{name}_model_0.json").write_text(json.dumps({"ptm": 0.5, "iptm": 0.25}))
    return folder / "boltz_results_x"


def test_superposition_undoes_any_rotation_and_no_reflection() -> None:
    for turn in Rotation.random(8, random_state=3):
        moved = turn.apply(COORDS) + RNG.normal(size=3) * 30
        assert similarity.rmsd(similarity.superposed(moved, COORDS), COORDS) < 1e-9
    noisy = COORDS + RNG.normal(size=COORDS.shape)
    least = similarity.rmsd(similarity.superposed(noisy, COORDS), COORDS)
    lists = ([gemmi.Position(*x) for x in a] for a in (COORDS, noisy))
    assert least == pytest.approx(gemmi.superpose_positions(*lists).rmsd, rel=1e-6)
    mirrored = COORDS * [1, 1, -1]
    assert similarity.rmsd(similarity.superposed(mirrored, COORDS), COORDS) > 1


def test_lddt_is_that_of_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    residues = [i // 4 for i in range(len(COORDS))]
    moved = COORDS + RNG.normal(size=COORDS.shape)
    kept = []
    for i, j in itertools.permutations(range(len(COORDS)), 2):
        true = np.linalg.norm(COORDS[i] - COORDS[j])
        if residues[i] != residues[j] and true <= 15:
            gap = abs(np.linalg.norm(moved[i] - moved[j]) - true)
            kept += [gap < limit for limit in (0.5, 1, 2, 4)]
    for pairs in (1 << 22, 64):  # at once, and in parts
        monkeypatch.setattr(similarity, "_PAIRS", pairs)
        assert similarity.lddt(moved, COORDS, residues) == pytest.approx(np.mean(kept))
    assert similarity.lddt(COORDS + 50, COORDS, residues) == 1
    assert similarity.lddt(COORDS * np.nan, COORDS, residues) == 0


def test_the_verdict_is_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turned = Rotation.from_euler("x", 70, degrees=True).apply(COORDS) + 9
    a = _results(tmp_path / "a", COORDS)
    cases = {
        "same structure": (turned, 0.0, 0),
        "similar structures": (COORDS, 1.0, 1),
        "different structures": (COORDS * 1.5, 0.0, 1),
    }
    for i, (verdict, (coords, off, code)) in enumerate(cases.items()):
        b = _results(tmp_path / f"b{i}", coords, off=off)
        assert compare.main([str(a), str(b.parent)]) == code
        said = capsys.readouterr().out
        assert verdict in said and ("TOO FAR" in said) == bool(code), said
        assert all(f"\n{name} " in said for name in ("coords", "plddt", "pae", "ptm", "iptm"))
    # A structure against another format of it, against a folder, and NaN, which is never the same.
    pdb = _write(tmp_path / "x.pdb", COORDS)
    assert compare.main([str(pdb), str(a / "predictions" / "one")]) == 0
    assert "one: 40 atoms" in capsys.readouterr().out
    broken = compare.Prediction(compare.read(pdb).atoms, COORDS * np.nan)
    assert not compare.compare(broken, compare.read(pdb)).same


def test_many_inputs_are_matched_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        a, b = (_results(tmp_path / side, COORDS, name) for side in "ab")
    assert compare.main([str(a), str(b)]) == 0
    assert "2 of 2 are the same" in capsys.readouterr().out
    _results(tmp_path / "b", COORDS, "three")
    assert compare.main([str(a), str(b)]) == 1
    assert "in one of them only: three" in capsys.readouterr().out


def test_what_cannot_be_compared_is_named(tmp_path: Path) -> None:
    a, shorter = _write(tmp_path / "a.cif", COORDS), _write(tmp_path / "b.cif", COORDS[:36])
    (tmp_path / "text.cif").write_text("not a structure")
    (tmp_path / "empty").mkdir()
    for other, said in (
        (shorter, "40 and 36, 4 in one of them only"),
        (tmp_path / "text.cif", "text.cif is no structure"),
        (tmp_path / "empty", "holds no prediction: name a folder boltz_results_"),
        (tmp_path / "nowhere", "holds no prediction"),
    ):
        with pytest.raises(UserError, match=said):
            compare.main([str(a), str(other)])
    with pytest.raises(UserError, match="no model 3: pass --model"):
        results = _results(tmp_path / "r", COORDS)
        compare.main([str(results), str(results), "--model", "3"])
