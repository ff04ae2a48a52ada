"""The demo without Boltz: what it concludes from two runs, and what it says and draws."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from predictions import COORDS, results
from scipy.spatial.transform import Rotation

from bench import mesh_memory
from bench.demo import __main__ as demo
from bench.demo import larger, overlay, predicted, runs
from foldcp.cli import compare

MOVED = np.array(COORDS)
MOVED[7] += 0.1
BENT = np.array(COORDS)
BENT[:20] = Rotation.from_euler("z", 30, degrees=True).apply(BENT[:20])
TURNED = Rotation.from_euler("x", 70, degrees=True).apply(COORDS) + 9


class Sides:
    """Runs that are over at once.

    Args:
        at: folder.
        coords: coordinates of foldcp.
        off: amount by which its PAE is larger.
        chain: scale of its chain.
    """

    def __init__(
        self, at: Path, coords: np.ndarray = COORDS, off: float = 0.0, chain: float = 1.0
    ) -> None:
        self.at, self.coords, self.off, self.chain = at, coords, off, chain

    def stock(self, *_: object) -> runs.Run:
        found = results(self.at / "stock", COORDS)
        return runs.Run(found / "predictions" / "one", 40.0, 1_230_000_000, 0)

    def foldcp(self, *_: object) -> runs.Run:
        found = results(self.at / "foldcp", self.coords, off=self.off)
        return runs.Run(found / "predictions" / "one", 50.0, 980_000_000, 7)

    def fold(self, side: str, *_: object) -> larger.Fold:
        mine = side == "foldcp"
        stretched = COORDS * [1, 1, self.chain if mine else 1]
        return larger.Fold(10.0 - 7 * mine, 1.0, 20.0, 1e9 - 8e8 * mine, stretched)


def run(at: Path, monkeypatch: pytest.MonkeyPatch, *options: str, **changed: object) -> int:
    at.mkdir()
    sides = Sides(at, **changed)
    monkeypatch.setattr(runs, "stock", sides.stock)
    monkeypatch.setattr(runs, "foldcp", sides.foldcp)
    monkeypatch.setattr(larger, "fold", sides.fold)
    monkeypatch.setattr(demo, "WORK", at)
    return demo.main(["--cache", str(at), *options])


def test_the_demo_says_that_both_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "same", monkeypatch) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1].startswith("SAME")
    for wanted in (
        "mean pLDDT (0 to 100) 70.00 70.00\n",
        "time, start-up included 40.0 s 50.0 s\n",
        "peak memory of a process 1.23 GB 0.98 GB\n",
        "folding 10.0 s 3.0 s 0.30x\n",
        "memory that folding adds 1.00 GB 0.20 GB 0.20x\n",
        f"RMSD below 0.0001 Å over {len(COORDS)} atoms",
    ):
        assert wanted in re.sub(" +", " ", said), said
    lines = said.replace(str(tmp_path), "").splitlines()
    assert max(len(line) for line in lines if ".cif" not in line) <= 100
    assert (tmp_path / "same" / "overlay.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({"coords": MOVED}, "ubiquitin, atom positions differ by up to 0.17 Å"),
        ({"coords": BENT}, "ubiquitin, atom positions differ by up to"),
        ({"coords": TURNED}, "ubiquitin, one structure is turned or shifted against the other"),
        ({"off": 0.5}, "ubiquitin, PAE differ by up to 0.5 Å"),
        ({"chain": 1.01}, "chain of 384 residues, atom positions differ"),
        ({"chain": np.nan}, "chain of 384 residues, atom positions differ"),
    ],
)
def test_a_difference_is_named_and_is_the_exit_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changed: dict[str, object],
    wanted: str,
) -> None:
    assert run(tmp_path / "differ", monkeypatch, **changed) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"DIFFERENT: {wanted}")


def test_a_run_that_fails_is_not_a_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(*_: object) -> None:
        raise RuntimeError("the foldcp run ended with code 1")

    monkeypatch.setattr(Sides, "foldcp", breaks)
    assert run(tmp_path / "broken", monkeypatch) == 2
    assert "demo failed: the foldcp run ended with code 1" in capsys.readouterr().err


@pytest.mark.process
def test_a_run_ends_with_a_report_or_an_error(tmp_path: Path) -> None:
    def execute(code: str) -> runs.Run:
        return runs._run("side", tmp_path, [sys.executable, "-c", code, "predict", "a/b.yaml"], {})

    with pytest.raises(RuntimeError, match=r"(?s)ended with code 3; the end of .*side.log:\nno$"):
        execute("print('no'); raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="FOLDCP=1 changed nothing"):
        execute("")
    report = f"open({str(tmp_path / 'side.json')!r}, 'w').write('{{\"peak_rss_bytes\": [1, 5]}}')"
    found = execute(report)
    assert (found.peak_bytes, found.sent_bytes) == (5, 0)
    assert found.prediction == tmp_path / "side" / "boltz_results_b" / "predictions" / "b"


def test_the_picture_shows_what_it_says(tmp_path: Path) -> None:
    made = [compare.read(results(tmp_path / x, c) / "predictions" / "one")
            for x, c in (("a", COORDS), ("b", MOVED), ("c", COORDS))]  # fmt: skip
    atoms = made[0].atoms
    shift = np.linalg.norm(made[1].coords - made[0].coords, axis=-1)
    assert np.allclose(overlay.by_residue(atoms, shift), [0, 0.173, *[0] * 8], atol=1e-3)
    assert [atoms[i][2] for i in overlay.alphas(atoms)] == ["CA"] * 10
    curve = overlay.smooth(COORDS, 8)
    assert np.allclose(curve[::8], COORDS) and len(curve) == 8 * 39 + 1
    line = np.arange(4.0)[:, None] * [1, 2, 3]
    assert np.allclose(overlay.smooth(line, 2)[1::2], line[:-1] + [0.5, 1, 1.5])
    drawn = [overlay.draw(x, made[0], tmp_path / f"{i}.png", ("one", "two")).read_bytes()
             for i, x in enumerate(made)]  # fmt: skip
    assert drawn[0] == drawn[2] != drawn[1]


@pytest.mark.boltz
def test_predicted_memory_is_what_the_model_counts() -> None:
    table = predicted.memory()
    tokens = min(table)
    counted = mesh_memory.rank_bytes(tokens, 1, 1) + mesh_memory.WEIGHTS
    assert counted == table[tokens]["1x1"], "run python -m bench.mesh_memory"
    for row in table.values():  # more GPUs, less memory of each
        assert list(row) == [f"{r}x{c}" for r, c in mesh_memory.MESHES]
        assert sorted(row.values(), reverse=True) == list(row.values())
    # The largest complex is one that the table would show as 72 GB.
    last, found = table[max(table)], predicted.largest()
    for mesh, most in found.items():
        per_pair = (last[mesh] - mesh_memory.WEIGHTS) / max(table) ** 2
        assert per_pair * most**2 + mesh_memory.WEIGHTS == pytest.approx(72e9, rel=1e-3)
