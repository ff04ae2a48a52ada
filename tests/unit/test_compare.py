"""`foldcp compare`: superposition, lDDT, the files of Boltz, and the verdict as an exit code."""

from __future__ import annotations

import itertools
from pathlib import Path

import gemmi
import numpy as np
import pytest
from predictions import COORDS, results, write
from scipy.spatial.transform import Rotation

from foldcp.cli import compare, similarity
from foldcp.errors import UserError

RNG = np.random.default_rng(5)


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
    a = results(tmp_path / "a", COORDS)
    cases = {
        "same structure": (turned, 0.0, 0),
        "similar structures": (COORDS, 1.0, 1),
        "different structures": (COORDS * 1.5, 0.0, 1),
    }
    for i, (verdict, (coords, off, code)) in enumerate(cases.items()):
        b = results(tmp_path / f"b{i}", coords, off=off)
        assert compare.main([str(a), str(b.parent)]) == code
        said = capsys.readouterr().out
        assert verdict in said and ("TOO FAR" in said) == bool(code), said
        assert all(f"\n{name} " in said for name in ("coords", "plddt", "pae", "ptm", "iptm"))
    # A structure against another format of it, against a folder, and NaN, which is never the same.
    pdb = write(tmp_path / "x.pdb", COORDS)
    assert compare.main([str(pdb), str(a / "predictions" / "one")]) == 0
    assert "one: 40 atoms" in capsys.readouterr().out
    broken = compare.Structure(compare.read(pdb).atoms, COORDS * np.nan)
    assert not compare.compare(broken, compare.read(pdb)).same
    holed = write(tmp_path / "nan.cif", COORDS * np.where(np.arange(3) == 1, np.nan, 1))
    for pair in ([holed, pdb], [pdb, holed], [holed, holed]):
        assert compare.main([str(path) for path in pair]) == 1
        assert "no structures: coordinates are" in capsys.readouterr().out
    far = [write(tmp_path / f"far{i}.cif", RNG.normal(size=COORDS.shape) * 900) for i in range(2)]
    assert compare.main([str(path) for path in far]) == 1
    assert "different structures" in capsys.readouterr().out


def test_many_inputs_are_matched_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        a, b = (results(tmp_path / side, COORDS, name) for side in "ab")
    assert compare.main([str(a), str(b)]) == 0
    assert "2 of 2 are the same" in capsys.readouterr().out
    results(tmp_path / "b", COORDS, "three")
    assert compare.main([str(a), str(b)]) == 1
    assert "in one of them only: three" in capsys.readouterr().out


def test_what_cannot_be_compared_is_named(tmp_path: Path) -> None:
    a, shorter = write(tmp_path / "a.cif", COORDS), write(tmp_path / "b.cif", COORDS[:36])
    (tmp_path / "text.cif").write_text("not a structure")
    (tmp_path / "nothing.cif").touch()
    (tmp_path / "no_atoms.cif").write_text("data_x\n")
    (tmp_path / "empty").mkdir()
    for name in ("one", "other"):
        results(tmp_path / "two", COORDS, name).rename(tmp_path / "two" / f"boltz_results_{name}")
    for other, said in (
        (shorter, "40 and 36, 4 in one of them only, such as B 10 C"),
        (
            tmp_path / "two",
            r"holds several folders \(boltz_results_one, boltz_results_other",
        ),
        (tmp_path / "nothing.cif", "nothing.cif is empty: name a structure that has atoms"),
        (tmp_path / "no_atoms.cif", "no_atoms.cif is empty"),
        (tmp_path / "text.cif", "text.cif cannot be read as a structure"),
        (tmp_path / "empty", "holds no prediction: name a folder boltz_results_"),
        (tmp_path / "nowhere", "does not exist: name a folder boltz_results_"),
    ):
        with pytest.raises(UserError, match=said):
            compare.main([str(a), str(other)])
    with pytest.raises(UserError, match="no model 3: pass --model"):
        made = results(tmp_path / "r", COORDS)
        compare.main([str(made), str(made), "--model", "3"])


def test_doing_what_it_says_helps(tmp_path: Path) -> None:
    pdb = write(tmp_path / "a.pdb", COORDS)
    made = results(tmp_path / "r", COORDS)
    one = made / "predictions" / "one"
    other = results(tmp_path / "o", COORDS, "other")
    results(tmp_path / "o", COORDS, "another")
    for wrong, advice, right in (
        ((tmp_path, made), "name a folder boltz_results_", (tmp_path / "r", made)),
        ((tmp_path, made), "the folder of one prediction in it", (one, made)),
        ((tmp_path, made), "or a structure (", (pdb, made)),
        ((made, made, "--model", "3"), "pass --model with one", (made, made, "--model", "0")),
        ((made, other), "name one prediction in each", (one, other / "predictions" / "other")),
    ):
        with pytest.raises(UserError) as refused:
            compare.main([*map(str, wrong)])
        assert advice in str(refused.value)
        assert compare.main([*map(str, right)]) == 0
