"""Inputs are read as stock reads them, whole or not at all, and nothing in them is run."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import signal
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boltz.main
import numpy as np
import pytest
from alone import prediction
from boltz.data import types
from boltz.data.module import inferencev2
from boltz_inputs import OTHER, PROTEIN, protein, random_a3m, random_csv, write_template
from rdkit import Chem

from foldcp.boltz.inputs import processing
from foldcp.boltz.run import Run

LIGAND = "- ligand: {id: L, smiles: 'CC(=O)Oc1ccccc1'}"
HEAD = ("version: 1", "sequences:")
FOLDERS = ("msa", "constraints", "templates", "mols", "structures", "records")


@pytest.fixture
def switched(monkeypatch: pytest.MonkeyPatch) -> None:
    """boltz.main with its reading of inputs switched over."""
    names = ("process_input", "process_inputs", "run_mmseqs2", "parse_a3m", "parse_csv")
    for name in (*names, "parse_yaml", "parse_fasta"):
        monkeypatch.setattr(boltz.main, name, getattr(boltz.main, name))
    monkeypatch.setattr(types.JSONSerializable, "dump", types.JSONSerializable.dump)
    monkeypatch.setattr(types.NumpySerializable, "load", vars(types.NumpySerializable)["load"])
    monkeypatch.setattr(inferencev2, "pickle", pickle)
    processing.install(boltz.main)


@pytest.fixture
def run(switched: None) -> Iterator[Run]:
    with prediction() as made:
        yield made


@pytest.fixture
def read(tiny_cache: Path) -> Callable[..., None]:
    """Read inputs into a results folder, as `boltz predict` does."""

    def process(data: list[Path], out: Path, **options: Any) -> None:
        boltz.main.process_inputs(
            data=data,
            out_dir=out,
            ccd_path=tiny_cache / "ccd.pkl",
            mol_dir=tiny_cache / "mols",
            msa_server_url="http://nowhere",
            msa_pairing_strategy="greedy",
            **{"boltz2": True, **options},
        )

    return process


def yaml(folder: Path, name: str, *lines: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text("\n".join([*HEAD, *lines]) + "\n")
    return path


def write_good(folder: Path) -> list[Path]:
    a3m, other = folder / "a.a3m", folder / "b.a3m"
    random_a3m(a3m, PROTEIN, 9, 1)
    random_a3m(other, OTHER, 5, 2)
    csv = random_csv(folder / "a.csv", PROTEIN, [1, 2, -1], 3)
    template = write_template(folder / "t.pdb", OTHER)
    both = [protein("A", PROTEIN, a3m), protein("B", OTHER, other), LIGAND]
    cut = ["templates:", f"- {{pdb: {template}, chain_id: B}}"]
    return [
        yaml(folder, "all", *both, *cut),
        yaml(folder, "csv", protein("A", PROTEIN, csv)),
        yaml(folder, "plain", protein("A", OTHER)),
    ]


def contents(folder: Path) -> dict[str, Any]:
    """What is in the files of a results folder, by name."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as arrays:
                found[name] = {key: arrays.read(key) for key in arrays.namelist()}
        elif path.suffix == ".pkl":
            mols = pickle.loads(path.read_bytes())  # their conformers are random
            found[name] = {key: _named_atoms(mol) for key, mol in mols.items()}
        elif path.suffix == ".json":
            found[name] = json.loads(path.read_text())
        else:
            found[name] = path.read_bytes()
    if manifest := found.get("processed/manifest.json"):
        manifest["records"].sort(key=lambda record: record["id"])
    return found


def _named_atoms(mol: Chem.Mol) -> tuple[str, list[str], int]:
    names = [atom.GetProp("name") for atom in mol.GetAtoms()]
    return Chem.MolToSmiles(mol), names, mol.GetNumConformers()


@pytest.fixture
def expected(
    read: Callable[..., None], tmp_path: Path, switched: None
) -> tuple[list[Path], dict[str, Any]]:
    """(inputs, what stock makes of them)."""
    (tmp_path / "in").mkdir()
    paths = write_good(tmp_path / "in")
    read(paths, tmp_path / "stock")
    return paths, contents(tmp_path / "stock")


@pytest.mark.parametrize("threads", [1, 2])
def test_reads_what_stock_reads(
    threads: int,
    expected: tuple[list[Path], dict[str, Any]],
    read: Callable[..., None],
    run: Run,
    tmp_path: Path,
) -> None:
    paths, want = expected
    read(paths, tmp_path / "ours", preprocessing_threads=threads)
    assert contents(tmp_path / "ours") == want and len(want) > 15 and run.failed == {}
    before = (tmp_path / "ours" / "processed" / "structures" / "all.npz").stat().st_ino
    read(paths, tmp_path / "ours")
    assert (tmp_path / "ours" / "processed" / "structures" / "all.npz").stat().st_ino == before
    assert sorted(p.name for p in (tmp_path / "ours" / "processed").iterdir()) == sorted(
        [*FOLDERS, "manifest.json"]
    )


def test_reads_for_boltz1_what_stock_reads(
    read: Callable[..., None], switched: None, tmp_path: Path
) -> None:
    a3m, csv = tmp_path / "a.a3m", tmp_path / "b.csv"
    random_a3m(a3m, PROTEIN, 9, 1)
    random_csv(csv, OTHER, [1, 2, -1], 3)
    lines = [protein("A", PROTEIN, a3m), protein("B", OTHER, csv), "- ligand: {id: L, ccd: MG}"]
    path = yaml(tmp_path, "one", *lines)
    read([path], tmp_path / "stock", boltz2=False)
    with prediction() as run:
        read([path], tmp_path / "ours", boltz2=False)
        assert run.failed == {}
    assert contents(tmp_path / "ours") == contents(tmp_path / "stock")


def _killed_at(moment: int, work: Callable[[], None]) -> bool:
    """Do some work in a child that is killed at the given file operation; False if it ended."""
    pid = os.fork()
    if pid == 0:
        left = moment

        def count(stock: Callable[..., Any], half: bool) -> Callable[..., Any]:
            def counted(*args: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left >= 0:
                    return stock(*args, **options)
                if half:  # stock's own files: killed in the middle of one
                    stock(*args, **options)
                    path = next(Path(a) for a in args if isinstance(a, (str, Path)))
                    os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

            return counted

        os.replace = count(os.replace, False)
        np.savez_compressed = count(np.savez_compressed, True)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def test_killed_at_any_moment_reads_again(
    expected: tuple[list[Path], dict[str, Any]],
    read: Callable[..., None],
    run: Run,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    paths, want = expected
    want = {name: value for name, value in want.items() if "all" in name}
    moment, killed = 0, True
    while killed:
        out = tmp_path / f"out{moment}"
        killed = _killed_at(moment, lambda out=out: read(paths[:1], out))
        if killed:
            done = contents(_finals(out))  # every file under a final name is whole
            assert all(want[f"processed/{name}"] == value for name, value in done.items())
            assert "records/all.json" not in done or len(done) == len(want), "record before files"
        read(paths[:1], out)
        got = contents(out)
        assert got.pop("processed/manifest.json")["records"] and got == want, moment
        moment += 1
    assert moment >= 15 and run.failed == {}


def _finals(out: Path) -> Path:
    """A copy of what has a final name, without what is under way."""
    copy = out.with_name(f"{out.name}_finals")
    ignored = shutil.ignore_patterns(".partial_*", "manifest.json")
    (out / "processed").mkdir(parents=True, exist_ok=True)
    shutil.copytree(out / "processed", copy, ignore=ignored)
    return copy


def _bad_alignments(folder: Path) -> dict[str, tuple[str, str]]:
    """(alignment, what the message says) by name of the input."""
    rows = f">1\n{PROTEIN}\n"
    texts = {
        "garbage.a3m": (bytes(range(256)), "it is not text"),
        "empty.a3m": (b"", "it has no sequences"),
        "names.a3m": (b">1\n>2\n", "it has no sequences"),
        "letters.a3m": (rows.encode() + b">2\nMK1\n", "the letter '1' stands for no residue"),
        "ragged.a3m": (
            rows.encode() + b">2\nMKT\n",
            "sequence 2 has 3 aligned positions, chain A has 33 residues, and Boltz would read mem",
        ),
        "headless.a3m": (PROTEIN.encode(), "its first sequence has no '>name' line above"),
        "marked.a3m": (b"\xef\xbb\xbf" + rows.encode(), "is a byte order mark"),
        "wide.csv": (f"key,sequence\n1,{PROTEIN},a,b\n".encode(), "more than two columns"),
        "quote.csv": (f'key,sequence\n1,"{PROTEIN}\n'.encode(), "a quotation mark is not closed"),
        "empty.csv": (b"", "No columns to parse"),
        "columns.csv": (f"id,seq\n1,{PROTEIN}\n".encode(), "expected columns"),
        "missing.csv": (b"key,sequence\n1,\n", "a row has no sequence"),
        "keys.csv": (
            f"key,sequence\n1,{PROTEIN}\nECOLI,{PROTEIN[1:]}M\n".encode(),
            "line 3: the key 'ECOLI' is no whole number",
        ),
        "cut.a3m.gz": (gzip.compress(rows.encode())[:-9], "it cannot be unpacked"),
        "not.a3m.gz": (rows.encode(), "it cannot be unpacked"),
        "denied.a3m": (rows.encode(), "Permission denied"),
        "wrong.sto": (rows.encode(), "only a3m or csv"),
    }
    for name, (text, _) in texts.items():
        (folder / name).write_bytes(text)
    (folder / "folder.a3m").mkdir()
    found = {name: said for name, (_, said) in texts.items()}
    found |= {"folder.a3m": "it is a folder, not a regular file", "nowhere.a3m": "not found"}
    return {name.replace(".", "_"): (str(folder / name), said) for name, said in found.items()}


def test_unusable_alignments_are_named_and_the_others_go_on(
    read: Callable[..., None], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = _bad_alignments(tmp_path)
    paths = [yaml(tmp_path, name, protein("A", PROTEIN, msa)) for name, (msa, _) in cases.items()]
    paths.insert(3, yaml(tmp_path, "good", protein("A", PROTEIN)))
    stock = Path.open

    def opened(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == "denied.a3m":  # root may read everything
            raise PermissionError(13, os.strerror(13), str(path))
        return stock(path, *args, **options)

    monkeypatch.setattr(Path, "open", opened)
    read(paths, tmp_path / "out")
    assert set(run.failed) == {f"{name}.yaml" for name in cases}
    for name, (msa, said) in cases.items():
        told = run.failed[f"{name}.yaml"]
        assert msa in told and said in told, told
        assert "correct" in told or "only a3m or csv" in told, told
    folder = tmp_path / "out" / "processed"
    assert [path.name for path in (folder / "records").iterdir()] == ["good.json"]
    assert {p.stem for kind in FOLDERS for p in (folder / kind).iterdir()} == {"good"}


UNFIT = {  # rows of an alignment of PROTEIN -> what is said about it for Boltz-2, and for Boltz-1
    "other": (
        [OTHER, PROTEIN],
        "is not used for chains A, C, as in Boltz: its first sequence has 16 residues and the chain"
        " 33; put the chain's own sequence first",
        "is used for chains A, C, as in Boltz, although its first sequence has 16 residues and the "
        "chain 33; put the chain's own sequence first; 1 of its 2 sequences has fewer aligned "
        "positions than the chain has residues (sequence 1: 16, not 33), and Boltz fills such a row"
        " with the start of the next, which is wrong; ",
    ),
    "mutant": (
        ["A" + PROTEIN[1:], PROTEIN],
        "is not used for chains A, C, as in Boltz: its first sequence differs from the chain's in 1"
        " residues (at 1 ALA instead of MET)",
        "is used for chains A, C, as in Boltz, although its first sequence differs from the",
    ),
    "uneven": (
        [PROTEIN, "MKT", "AC" + PROTEIN, "WY", PROTEIN[::-1]],
        "is used for chains A, C, as in Boltz, although 2 of its 5 sequences have fewer aligned "
        "positions than the chain has residues (sequence 2: 3, not 33), and Boltz fills such a row "
        "with the start of the next, which is wrong; 1 of its 5 sequences has more aligned "
        "positions than the chain has residues (sequence 3: 35, not 33), and Boltz leaves out what "
        "is past the chain's end;",
        "is used for chains A, C, as in Boltz, although 2 of its 5 sequences have fewer",
    ),
}


@pytest.mark.parametrize("boltz2", [True, False])
@pytest.mark.parametrize("name", UNFIT)
def test_alignments_that_do_not_fit_are_folded_as_in_stock(
    name: str,
    boltz2: bool,
    read: Callable[..., None],
    tmp_path: Path,
    switched: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And one line says what is wrong. The predictions: tests/runs/test_predict.py."""
    rows, *said = UNFIT[name]
    (tmp_path / "x.a3m").write_text("".join(f">{i}\n{row}\n" for i, row in enumerate(rows)))
    chains = [protein("[A, C]", PROTEIN, tmp_path / "x.a3m"), protein("B", OTHER)]
    path = yaml(tmp_path, name, *chains)
    read([path], tmp_path / "stock", boltz2=boltz2)
    capsys.readouterr()
    with prediction() as run:
        read([path], tmp_path / "ours", boltz2=boltz2)
        assert run.failed == {}
    assert contents(tmp_path / "ours") == contents(tmp_path / "stock")
    (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("foldcp: "))
    assert line.startswith(f"foldcp: the MSA {tmp_path}/x.a3m {said[1 - boltz2]}"), line


def test_answers_of_the_server_are_kept_whole(
    read: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged answer is asked for again, a whole one is used though the next one failed."""
    asked, down = [], ["unpaired"]

    def server(x: Any, prefix: Path, use_pairing: bool, **options: Any) -> list[str]:
        kind = "paired" if use_pairing else "unpaired"
        folder = Path(f"{prefix}_{'pairgreedy-env' if use_pairing else 'env'}")
        folder.mkdir(exist_ok=True)
        answer = folder / "out.tar.gz"
        if not answer.exists():
            asked.append(kind)
            answer.write_text("whole")
            if kind in down:
                raise RuntimeError("the server is down")
        assert answer.read_text() == "whole"
        return [f">1\n{sequence}\n" for sequence in x]

    monkeypatch.setattr(boltz.main, "run_mmseqs2", server)
    for name in ("process_input", "process_inputs", "parse_a3m", "parse_csv"):
        monkeypatch.setattr(boltz.main, name, getattr(boltz.main, name))
    monkeypatch.setattr(types.JSONSerializable, "dump", types.JSONSerializable.dump)
    monkeypatch.setattr(types.NumpySerializable, "load", vars(types.NumpySerializable)["load"])
    monkeypatch.setattr(inferencev2, "pickle", pickle)
    processing.install(boltz.main)
    chains = [f"- protein: {{id: {c}, sequence: {s}}}" for c, s in (("A", PROTEIN), ("B", OTHER))]
    path, out = yaml(tmp_path, "two", *chains), tmp_path / "out"
    with prediction() as run:
        read([path], out, use_msa_server=True)
        assert run.failed == {"two.yaml": "the server is down"} and asked == ["paired", "unpaired"]
        assert [p.name for p in (out / "msa").iterdir()] == ["two_paired_tmp_pairgreedy-env"]
        down.clear()
        (out / "msa" / "two_paired_tmp_pairgreedy-env" / "out.tar.gz").write_text("ha")
        read([path], out, use_msa_server=True)
    assert asked == ["paired", "unpaired", "paired", "unpaired"]
    assert sorted(p.name for p in (out / "msa").iterdir()) == [
        "two_0.csv", "two_1.csv", "two_paired_tmp_pairgreedy-env", "two_unpaired_tmp_env",
    ]  # fmt: skip
    assert PROTEIN in (out / "msa" / "two_0.csv").read_text()
    shutil.rmtree(out / "processed")
    with prediction():
        read([path], out, use_msa_server=True)
    assert len(asked) == 4 and (out / "processed" / "records" / "two.json").exists()


def test_damaged_records_are_read_again(
    expected: tuple[list[Path], dict[str, Any]],
    read: Callable[..., None],
    run: Run,
    tmp_path: Path,
) -> None:
    paths, want = expected
    out = tmp_path / "ours"
    read(paths, out)
    record = out / "processed" / "records" / "csv.json"
    record.write_text(record.read_text()[:50])
    read(paths, out)
    assert contents(out) == want and run.failed == {}


def test_alignments_are_read_packed_and_in_any_case(
    read: Callable[..., None], run: Run, tmp_path: Path
) -> None:
    a3m, csv = tmp_path / "a.a3m", tmp_path / "b.csv"
    random_a3m(a3m, PROTEIN, 9, 1)
    random_csv(csv, PROTEIN, [1, 2, -1], 3)
    names = {"a.A3M": a3m, "p.a3m.gz": a3m, "P.A3M.GZ": a3m, "b.CSV": csv, "b.csv.gz": csv}
    paths = []
    for number, (name, source) in enumerate(names.items()):
        packed = name.lower().endswith(".gz")
        data = source.read_bytes()
        (tmp_path / name).write_bytes(gzip.compress(data) if packed else data)
        paths.append(yaml(tmp_path, f"x{number}", protein("A", PROTEIN, tmp_path / name)))
    plain = [yaml(tmp_path, "p", protein("A", PROTEIN, a3m))]
    plain.append(yaml(tmp_path, "q", protein("A", PROTEIN, csv)))
    read([*paths, *plain], tmp_path / "out")
    assert run.failed == {}
    found = contents(tmp_path / "out" / "processed" / "msa")
    wanted = {a3m: found.pop("p_0.npz"), csv: found.pop("q_0.npz")}
    assert list(found.values()) == [wanted[source] for source in names.values()]


def test_what_is_gone_or_of_the_other_model_is_read_again(
    expected: tuple[list[Path], dict[str, Any]],
    read: Callable[..., None],
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths, want = expected
    out = tmp_path / "ours"
    read(paths, out)
    done = out / "processed"
    for gone in (
        "structures",
        "structures/all.npz",
        "msa/all_1.npz",
        "templates/all_t.npz",
        "mols",
    ):
        (shutil.rmtree if (done / gone).is_dir() else os.unlink)(done / gone)
        read(paths, out)
        assert contents(out) == want and run.failed == {}, gone
        assert "all is read again: its file " in capsys.readouterr().err
    for boltz2, told in ((False, "read for Boltz-2, and this run is of B"), (True, "for Boltz-1")):
        read(paths[1:], out, boltz2=boltz2)
        assert run.failed == {} and told in capsys.readouterr().err
        with zipfile.ZipFile(done / "structures" / "csv.npz") as arrays:
            assert ("coords.npy" in arrays.namelist()) == boltz2
