"""The report of a run and of any results folder: what it shows, leaves out and costs."""

from __future__ import annotations

import json
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import gemmi
import numpy as np
import pytest
from alone import prediction
from predictions import COORDS, results, write

from foldcp.boltz import reporting
from foldcp.cli import report as command
from foldcp.config import Config
from foldcp.errors import UserError
from foldcp.output.report import matrix, page, png, predictions
from foldcp.output.report.writing import report
from foldcp.output.results import Chain, chains
from foldcp.planner import gpus
from foldcp.planner.plan import plan
from foldcp.planner.workload import Workload
from foldcp.runtime.screen.stages import Stages

HOSTILE = """a<script>alert(1)<'"&b:c%41#?"""
VOID = {"meta", "img", "line", "rect", "polyline"}


class Read(HTMLParser):
    """Fails on a page that is not well formed, runs something or refers to anything outside."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[Path] = []
        self.images: list[str] = []
        self.text, self.at = "", path.parent
        self.feed(path.read_text())
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "object", "base", "form"), tag
        given = dict(attrs)
        assert not [name for name in given if name.startswith("on")], attrs
        assert "url(" not in (given.get("style") or "")
        if tag == "a":
            href = given["href"] or ""
            assert not re.match(r"[a-z]+:|/", href, re.IGNORECASE), href
            self.links.append(self.at / unquote(href))
        elif "src" in given:
            head, _, data = (given["src"] or "").partition(",")
            assert tag == "img" and head == "data:image/png;base64"
            self.images.append(data)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID, tag

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["style"]:
            assert "url(" not in data and "@import" not in data
        else:
            self.text += f"{data} "


def decoded(data: bytes) -> tuple[np.ndarray, bytes]:
    """Pixels and palette of a PNG without filters; fails where a checksum is wrong."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, found = 8, {}
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(
            kind + body
        )
        found[kind] = body
        at += 12 + size
    width, height, *kinds = struct.unpack(">IIBBBBB", found[b"IHDR"])
    assert kinds == [8, 3, 0, 0, 0] and list(found) == [b"IHDR", b"PLTE", b"IDAT", b"IEND"]
    rows = np.frombuffer(zlib.decompress(found[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not rows[:, 0].any()
    return rows[:, 1:], found[b"PLTE"]


def test_an_image_is_read_back() -> None:
    pixels = np.arange(35, dtype=np.uint8).reshape(5, 7)
    got, palette = decoded(png.encode(pixels, [(i, 0, 255 - i) for i in range(35)]))
    assert (got == pixels).all() and palette[3:6] == bytes((1, 0, 254))
    for wrong in (np.zeros((0, 3), np.uint8), np.zeros(3, np.uint8)):
        with pytest.raises(ValueError, match="must be .height, width. and not empty"):
            png.encode(wrong, [(0, 0, 0)])
    with pytest.raises(ValueError, match="has 34 colours; pixels go up to 34"):
        png.encode(pixels, [(0, 0, 0)] * 34)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 63])
def test_a_matrix_is_reduced_in_parts(
    n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.random.default_rng(n).normal(size=(n, n)).astype(np.float32)
    values[n // 2, 0] = np.nan
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "m.npz", pae=values)
        for at_once in (1, 1 << 24):
            monkeypatch.setattr(matrix, "_AT_ONCE", at_once)
            got, size = matrix.reduced(tmp_path / "m.npz", "pae", 8)
            side = -(-n // 8)
            parts = [slice(i, i + side) for i in range(0, n, side)]
            expected = [[values[a, b].astype(np.float64).mean() for b in parts] for a in parts]
            assert size == n and len(got) <= 8
            np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_other_matrices_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.npz"
    wrong: dict[str, Any] = {
        "shape (2, 3)": np.zeros((2, 3)), "shape (0, 0)": np.zeros((0, 0)),
        "no numbers": np.array([["x"]]), "row by row": np.asfortranarray(np.eye(3)),
        "no numbers,": np.array([[{}]], object),
    }  # fmt: skip
    for said, value in wrong.items():
        np.savez(path, pae=value)
        with pytest.raises(ValueError, match=re.escape(said)):
            matrix.reduced(path, "pae", 8)
    with pytest.raises(ValueError, match="holds no pde"):
        matrix.reduced(path, "pde", 8)


def test_tokens_of_chains_are_those_of_boltz(tmp_path: Path) -> None:
    """A standard residue is one token; each atom of any other residue is one."""
    text = []
    for group, name, chain, number, atoms in (
        ("ATOM", "ALA", "A", 1, ("N", "CA")), ("HETATM", "SEP", "A", 2, ("N", "CA", "P")),
        ("ATOM", "GLY", "A", 3, ("N",)), ("ATOM", "DA", "B", 1, ("P", "C1'")),
        ("HETATM", "LIG", "C", 1, ("C1", "C2", "O1", "O2")), ("HETATM", "MG", "D", 1, ("MG",)),
        ("HETATM", "ALA", "E", 1, ("N", "CA")),
    ):  # fmt: skip
        text += [
            f"{group:6}{len(text) + i + 1:5}  {atom:<3} {name:>3} {chain}{number:4}    "
            f"{i:8.3f}{0:8.3f}{0:8.3f}  1.00  0.00          {atom[0]:>2}"
            for i, atom in enumerate(atoms)
        ]
    (tmp_path / "x.pdb").write_text("\n".join(text))
    structure = gemmi.read_structure(str(tmp_path / "x.pdb"))
    structure.setup_entities()
    structure.make_mmcif_document().write_file(str(tmp_path / "x.cif"))
    expected = [Chain("A", "mixed", 5), Chain("B", "polymer", 1), Chain("C", "ligand", 4)]
    for name in ("x.pdb", "x.cif"):
        assert chains(tmp_path / name) == [
            *expected, Chain("D", "ligand", 1), Chain("E", "ligand", 2),
        ], name  # fmt: skip


def full(folder: Path, name: str = "one") -> Path:
    """A results folder of two chains with everything that Boltz writes about a prediction."""
    made = results(folder, COORDS, name)
    at = made / "predictions" / name
    pairs = {str(i): {str(j): 0.1 * (2 * i + j + 1) for j in range(2)} for i in range(2)}
    scores = {"confidence_score": 0.625, "ptm": 0.5, "iptm": 0.25, "complex_plddt": 0.7}
    for model in range(2):
        path = at / f"confidence_{name}_model_{model}.json"
        path.write_text(json.dumps({**scores, "pair_chains_iptm": pairs}))
    affinity = {"affinity_pred_value": -1.5, "affinity_probability_binary": 0.75}
    (at / f"affinity_{name}.json").write_text(json.dumps(affinity))
    return made


def test_a_page_shows_what_was_planned_beside_what_it_came_to(tmp_path: Path) -> None:
    made, cluster = full(tmp_path), gpus.parse("4xh100-80")
    plans = [plan(Workload(n, 8 * n, 64), cluster) for n in (2000, 3605)]
    expected = [reporting._planned(one) for one in plans]
    for one, told in zip(plans, expected, strict=True):
        stages = told["stages"].values()
        assert sum(x["seconds"] for x in stages) == pytest.approx(one.total_s)
        assert max(x["peak_bytes"] for x in stages) == one.needed - one.beside
        assert 0 < told["hidden"] <= 1
    ranks = [{"trunk": {"seconds": s, "peak_bytes": s * 10**9}} for s in (41.25, 40.0)]
    costs = {"stages": ranks, "inputs": {
        "a": {"planned": expected[0]}, "b": {"planned": expected[1]}, "c": {"planned": "?"}
    }}  # fmt: skip
    (made / "foldcp_report.json").write_text(json.dumps(costs))
    text = Read(report(made)).text
    seconds = sum(x["stages"]["trunk"]["seconds"] for x in expected)
    peak = expected[1]["stages"]["trunk"]["peak_bytes"] / 1e9
    row = rf"trunk +{seconds:,.2f} +41.25 +{peak:.3g} GB +41.2 GB"
    assert "Planned and actual" in text and re.search(row, text), text
    share = sum(x["hidden"] for x in expected) / 2
    assert f"Kernels hide {share:.0%} of the transfers, modelled" in text


def test_a_page_shows_all_and_escapes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = full(tmp_path, HOSTILE)
    costs = {
        "seconds": 2.0, "mesh": "<i>", "version": "<b>", "peak_rss_bytes": [10**9, "<x>"],
        "sent_bytes": [5, None, 10**400, 0.5], "received_bytes": [5, 5],
        "exchanged": [{"<y>": 5}, {"<y>": 6}],
        "stages": [
            {"<z>": {"seconds": 1.5, "peak_bytes": 10**9}}, {"<z>": {"seconds": float("nan")}}, 3,
        ],
        "inputs": {"<q>": {"status": "failed", "reason": "<r>"}, "two": {"tokens": 1200,
                   "strategies": {"triangle_attention": "<s>"}}},
    }  # fmt: skip
    (made / "foldcp_report.json").write_text(json.dumps(costs))
    assert command.main([str(tmp_path)]) == 0
    path = made / "foldcp_report.html"
    assert capsys.readouterr().out == f"foldcp: report: {path}\n"
    seen = Read(path)
    for part in (
        *(f"<{x}>" for x in "ibyzqrs"),
        "1,200",
        "1.50",
        HOSTILE,
        "0.625",
        "-1.500",
        "0.750",
    ):
        assert part in seen.text, part
    assert len(seen.images) == 1 and path.read_text().count("<polyline") == 1
    assert path.read_text().count('class="border"') == 2  # one between two chains, both ways
    assert re.search(r"ipTM of pairs of chains +A +B +A +0.10 +0.20 +B +0.30 +0.40", seen.text)
    assert sorted(seen.links) == sorted((made / "predictions" / HOSTILE).iterdir())
    # The folder of a prediction, another place for the page, and a folder that holds several.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    report(made / "predictions" / HOSTILE, out=elsewhere / "p.html")
    assert all(link.resolve().is_file() for link in Read(elsewhere / "p.html").links)


def test_what_is_missing_is_left_out_and_what_is_broken_named(tmp_path: Path) -> None:
    made = full(tmp_path)
    at = made / "predictions" / "one"
    shown = {
        "plddt_one_model_0.npz": "pLDDT along the chains", "pae_one_model_0.npz": "aligned on",
        "confidence_one_model_0.json": "ipTM of pairs", "affinity_one.json": "of a binder",
    }  # fmt: skip
    for name, words in shown.items():
        assert words in Read(report(made)).text
        whole = (at / name).read_bytes()
        (at / name).unlink()
        seen = Read(report(made))
        assert words not in seen.text and "cannot be read" not in seen.text
        for broken in (b"", b"[1]", b'{"a": ' * 99_999, whole[: len(whole) // 2], b"\xff\x00"):
            (at / name).write_bytes(broken)
            seen = Read(report(made))
            assert words not in seen.text and f"{name} cannot be read" in seen.text, broken[:9]
        (at / name).write_bytes(whole)
    write(at / "one_model_0.cif", COORDS[:36])  # its tokens are not those of pLDDT
    assert 'class="border"' not in report(made).read_text()
    (at / "one_model_0.cif").write_text("data_x")
    assert "one_model_0.cif is empty" in Read(report(made)).text
    (made / "foldcp_report.json").write_text("[")
    assert "foldcp_report.json cannot be read" in Read(report(made)).text


def test_large_and_many_predictions_stay_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for i in range(25):
        made = results(tmp_path, COORDS, f"in{i:02}")
        noise = 30 * rng.random((320, 320), np.float32)
        np.savez(made / f"predictions/in{i:02}/pae_in{i:02}_model_0.npz", pae=noise)
    path = report(made)
    seen = Read(path)
    assert path.stat().st_size < 5e6 and len(seen.images) == page.DETAILED
    assert "5 more without pictures" in seen.text and "in24" in seen.text
    only = Read(report(made, ["in24"]))
    assert len(only.images) == 1 and "in00" not in only.text
    large = np.zeros((5000, 5000), np.float32)
    np.savez_compressed(made / "predictions/in24/pae_in24_model_0.npz", pae=large)
    found = predictions.read_best(made / "predictions/in24")
    assert found.pae is not None and len(found.pae) == 313 <= predictions.PIXELS
    assert "mean of 16 x 16 tokens" in Read(report(made, ["in24"])).text


def test_folders_without_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = full(tmp_path)
    write(tmp_path / "x.cif", COORDS)
    cases = [
        (tmp_path / "no", "no does not exist: name a folder boltz_results_"),
        (tmp_path / "x.cif", "x.cif is a structure: name the folder"),
        (made / "predictions", "holds no prediction: name a folder"),
    ]
    for path, said in cases:
        with pytest.raises(UserError, match=re.escape(said)):
            report(path)
    with pytest.raises(UserError, match="holds no prediction 'two': name one of those .*one"):
        report(made, ["two"])
    with pytest.raises(UserError, match="cannot be used .No such file.*--out"):
        report(made, out=tmp_path / "no" / "x.html")

    def refuse(path: Path) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("foldcp.output.report.writing.os.listdir", refuse)
    with pytest.raises(UserError, match="cannot be read .Permission denied.: change its perm"):
        report(made)


def test_a_run_writes_where_it_is_asked_and_never_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = full(tmp_path)
    numbers, victim = made / "foldcp_report.json", tmp_path / "victim"
    victim.write_text("as it was")
    with prediction() as run:
        run.session.groups, run.known, run.asked = 1, ("one", "old"), ("one",)
        costs = {"seconds": 1.0, "mesh": "1x1"}

        def written(asked: str) -> str:
            run.config = Config.from_env({"FOLDCP_REPORT": asked})
            reporting.write(run, made, costs, {"bad": "why"}, {"one": 10})
            return capsys.readouterr().err

        assert written("0") == "" and not numbers.exists()
        (made / ".foldcp_report.json.partial").symlink_to(victim)
        numbers.symlink_to(victim)
        assert written("") == "" == written("1")
        assert victim.read_text() == "as it was" and not numbers.is_symlink()
        inputs = json.loads(numbers.read_text())["inputs"]
        assert inputs == {
            "one": {"status": "folded", "tokens": 10}, "old": {"status": "done before"},
            "bad": {"status": "failed", "reason": "why"},
        }  # fmt: skip
        assert "why" in Read(made / "foldcp_report.html").text
        assert written(str(tmp_path / "c.json")) == "" and (tmp_path / "c.json").is_file()
        gone = tmp_path / "gone" / "c.json"
        assert f"FOLDCP_REPORT={gone} is not written: No such file" in written(str(gone))
        numbers.unlink()
        numbers.mkdir()
        assert f"the report in {made} is not written: Is a directory" in written("1")
        numbers.rmdir()
        run.seal = SimpleNamespace(check=lambda: 1 / 0)
        assert "is not written: division by zero" in written("1") and not numbers.exists()
    assert not list(made.glob(".foldcp*"))


def test_stages_add_up() -> None:
    stages = Stages()
    for name in ("trunk", "sampling", "trunk"):
        stages.begin(name)
    found = stages.end()
    assert list(found) == ["trunk", "sampling"] and stages.end() == found
    assert all(one["peak_bytes"] > 1e7 and one["seconds"] >= 0 for one in found.values())
