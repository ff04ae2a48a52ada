"""What is written equals what stock writes, costs little memory, and is whole or absent."""

from __future__ import annotations

import errno
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from alone import prediction
from written import SAMPLES, N, inputs_of, make, send, write, writer_of

from bench.outputs import blocks, measure
from foldcp.boltz.lightning.writers import RootAffinityWriter
from foldcp.boltz.run import Run
from foldcp.output import folders
from foldcp.output import spool as spools
from foldcp.output.spool import Background, Spool

if TYPE_CHECKING:
    from parity import Prepared

GB = 10**9


@pytest.fixture
def run() -> Iterator[Run]:
    """A prediction under way on one rank."""
    with prediction() as made:
        yield made


@pytest.fixture
def inputs(prepared: Callable[[str], Prepared]) -> SimpleNamespace:
    """See `written.inputs_of`."""
    return inputs_of(prepared("heterodimer"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder; of an npz the bytes of each array with its header."""
    found = {}
    for path in folder.iterdir():
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                for member in archive.namelist():
                    found[f"{path.name}/{member}"] = archive.read(member)
        else:
            found[path.name] = path.read_bytes()
    return found


@pytest.mark.parametrize("form", ["mmcif", "pdb"])
def test_files_equal_stocks(form: str, inputs: SimpleNamespace, run: Run, tmp_path: Path) -> None:
    from boltz.data.write.writer import BoltzWriter

    options = {"output_format": form, "write_embeddings": form == "mmcif"}
    batch, prediction = make(inputs)
    name = batch["record"][0].id
    stock = BoltzWriter(inputs.structures, tmp_path / "stock", boltz2=True, **options)
    write(stock, dict(prediction), batch)
    want = contents(tmp_path / "stock" / name)
    if form == "pdb":
        del prediction["z"]
    for way in ("spool", "memory"):
        ours = writer_of(inputs, tmp_path / way, **options)
        mine = dict(prediction)
        if way == "spool":
            assert send(ours, mine, name) and "pae" not in mine
        write(ours, mine, batch)
        ours.on_predict_epoch_end(None, None)
        got = contents(tmp_path / way / "predictions" / name)
        assert got.keys() == want.keys()
        assert [key for key in want if got[key] != want[key]] == []
        assert [path.name for path in (tmp_path / way).iterdir()] == ["predictions"]
    assert run.failed == {}
    spooled = np.load(tmp_path / "spool" / "predictions" / name / f"pae_{name}_model_0.npz")
    assert np.array_equal(spooled["pae"], prediction["pae"][1].numpy())
    if form == "mmcif":
        assert (
            f"embeddings_{name}.npz/z.npy" in want and f"pre_affinity_{name}.npz/atoms.npy" in want
        )


def test_ten_thousand_tokens_stay_out_of_memory(tmp_path: Path) -> None:
    found = measure("foldcp", 10_000, "steps", tmp_path)
    assert found["extra_mib"] * 2**20 < GB / 4, found  # the matrix has 0.4 GB
    whole = np.load(tmp_path / "pae.npz")["pae"]
    assert whole.shape == (10_000, 10_000) and whole.dtype == np.float32
    for lo, block in blocks(10_000, "steps"):
        assert np.array_equal(whole[lo : lo + len(block)], block.numpy()), lo


def test_packing_is_off_the_critical_path(
    inputs: SimpleNamespace, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a matrix is packed the next input is written, and neither has its final name."""
    stock, gate = spools.pack, threading.Event()
    threads = set()

    def pack(*args: Any, **options: Any) -> None:
        threads.add(threading.current_thread())
        assert gate.wait(60)
        stock(*args, **options)

    monkeypatch.setattr(spools, "pack", pack)
    ours = writer_of(inputs, tmp_path)
    for name in ("first", "second"):
        batch, prediction = make(inputs, name)
        shutil.copy(inputs.structures / "heterodimer.npz", inputs.structures / f"{name}.npz")
        del prediction["z"]
        assert send(ours, prediction, name)
        write(ours, prediction, batch)
    assert list((tmp_path / "predictions").iterdir()) == []
    gate.set()
    ours.on_predict_epoch_end(None, None)
    assert {p.name for p in (tmp_path / "predictions").iterdir()} == {"first", "second"}
    assert threading.main_thread() not in threads
    for thread in threads:  # a soak would collect them
        thread.join(10)
        assert not thread.is_alive()


def test_stopped_run_stores_what_is_complete_uncompressed(tmp_path: Path) -> None:
    hurry, gate = threading.Event(), threading.Event()
    packers = Background(1)
    packers.submit(lambda: gate.wait(60))
    sink = Spool(tmp_path, packers, hurry)
    matrix = torch.zeros((N, N))
    sink.rows("pae", 0, 0, matrix)
    hurry.set()
    gate.set()
    packed = sink.packed(("pae", 0))
    assert packed.stat().st_size > matrix.nbytes and not np.load(packed)["pae"].any()
    with pytest.raises(ValueError, match="row 3 of pde of sample 1; expected 2"):
        sink.rows("pde", 1, 0, matrix[:2])
        sink.rows("pde", 1, 3, matrix[3:])
    with pytest.raises(ValueError, match="rows of pde of sample 1 are missing"):
        sink.keys()


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt()])
def test_interrupted_prediction_has_no_final_name(
    error: BaseException, inputs: SimpleNamespace, run: Run, tmp_path: Path
) -> None:
    """A complete prediction still gets to disk, one that is under way leaves nothing."""
    ours = writer_of(inputs, tmp_path)
    batch, prediction = make(inputs)
    del prediction["z"]
    name = batch["record"][0].id
    assert send(ours, dict(prediction), "other", upto=14)
    assert send(ours, prediction, name)
    write(ours, prediction, batch)
    ours.on_exception(None, None, error)
    assert [path.name for path in (tmp_path / "predictions").iterdir()] == [name]
    assert [path.name for path in tmp_path.iterdir()] == ["predictions"]


def test_killed_run_leaves_no_final_name_and_is_redone(
    inputs: SimpleNamespace, run: Run, tmp_path: Path
) -> None:
    code = (
        "import os, signal, sys, threading, torch\n"
        "from pathlib import Path\n"
        "from foldcp.output import spool\n"
        "from foldcp.output.folders import Matrices, Outputs\n"
        "stock = spool._copy\n"
        "def copy(*args):\n"
        "    stock(*args)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "spool._copy = copy\n"
        "made = Outputs(Path(sys.argv[1]), print)\n"
        "sink = made.spool(sys.argv[2], {('pae', 0): 0})\n"
        "(made.partial(sys.argv[2]) / sys.argv[2]).mkdir()\n"
        "sink.rows('pae', 0, 0, torch.rand((50, 50)))\n"
        "made.complete(sys.argv[2], Matrices(sink, [0]))\n"
        "made.finish()\n"
    )
    batch, prediction = make(inputs)
    del prediction["z"]
    name = batch["record"][0].id
    folder = tmp_path / "predictions"
    folder.mkdir()
    ended = subprocess.run([sys.executable, "-c", code, str(folder), name], capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert list(folder.iterdir()) == [] and (tmp_path / f".partial_alone_{name}").is_dir()
    ours = writer_of(inputs, tmp_path)
    assert send(ours, prediction, name)
    write(ours, prediction, batch)
    ours.on_predict_epoch_end(None, None)
    assert len(list((folder / name).glob("pae_*.npz"))) == SAMPLES
    assert [path.name for path in tmp_path.iterdir()] == ["predictions"]


def test_override_replaces_whole_predictions(
    inputs: SimpleNamespace, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only the old folder has stays, but not the affinity that followed from it."""
    batch, prediction = make(inputs)
    del prediction["z"]
    name = batch["record"][0].id
    folder = tmp_path / "predictions" / name
    (folder / "mine").mkdir(parents=True)
    before = {f"{name}_model_0.cif": b"old", "notes.txt": b"n", f"affinity_{name}.json": b"{}"}
    for file, text in before.items():
        (folder / file).write_bytes(text)
    ours = writer_of(inputs, tmp_path)
    mine = dict(prediction)
    assert send(ours, mine, name)
    with monkeypatch.context() as patch:
        patch.setattr(folders, "append", None)
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "bad")))
        write(ours, mine, batch)
        ours._outputs.finish()
    assert {p.name for p in folder.iterdir()} == {*before, "mine"}, "a failure changed old results"
    assert (folder / f"{name}_model_0.cif").read_bytes() == b"old" and run.failed
    mine = dict(prediction)
    assert send(ours, mine, name)
    write(ours, mine, batch)
    ours.on_predict_epoch_end(None, None)
    assert (folder / f"{name}_model_0.cif").read_bytes() != b"old"
    assert (folder / "notes.txt").read_bytes() == b"n" and (folder / "mine").is_dir()
    assert not (folder / f"affinity_{name}.json").exists()
    affinity = RootAffinityWriter(inputs.structures, tmp_path / "predictions")
    value = torch.tensor([0.5])
    values = {"affinity_pred_value": value, "affinity_probability_binary": value}
    write(affinity, {"exception": False, **values}, batch)
    assert (folder / f"affinity_{name}.json").exists() and (folder / "notes.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["predictions"]


def test_prediction_without_all_its_matrices_is_no_success(
    inputs: SimpleNamespace, run: Run, tmp_path: Path
) -> None:
    ours = writer_of(inputs, tmp_path)
    batch, prediction = make(inputs)
    name = batch["record"][0].id
    sizes = {(key, m): N * N for key in ("pae", "pde") for m in range(SAMPLES)}
    sink = ours.open_outputs(name, sizes)
    for sample in range(SAMPLES):
        sink.rows("pae", sample, 0, prediction["pae"][sample])
    found = {key: value for key, value in prediction.items() if key not in ("pae", "pde", "z")}
    write(ours, {**found, "sink": sink}, batch)
    ours.on_predict_epoch_end(None, None)
    assert "its matrices are [('pae', 0), ('pae', 1), ('pae', 2)]; expected" in run.failed[name]
    assert [path.name for path in tmp_path.iterdir()] == ["predictions"]
    assert list((tmp_path / "predictions").iterdir()) == []


class Records:
    """Stands for a manifest."""

    def __init__(self, records: list[Any]) -> None:
        self.records = records


def test_affinity_pass_leaves_out_what_has_no_structure(run: Run, tmp_path: Path) -> None:
    from boltz.main import filter_inputs_affinity

    from foldcp.boltz.switch import _decided_by_root

    asked = {"written": True, "failed": True, "structure_only": None}
    records = [SimpleNamespace(id=name, affinity=affinity) for name, affinity in asked.items()]
    for name in ("written", "structure_only"):
        (tmp_path / "predictions" / name).mkdir(parents=True)
    (tmp_path / "predictions" / "written" / "pre_affinity_written.npz").touch()
    manifest = Records(records)
    ready = _decided_by_root(filter_inputs_affinity, affinity=True)
    assert [r.id for r in ready(manifest=manifest, outdir=tmp_path).records] == ["written"]
    assert filter_inputs_affinity(manifest, tmp_path).records == records, "stock keeps them all"
