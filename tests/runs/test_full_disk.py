"""A full disk costs the input that finds no room, and says so; nothing half-written stays."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from alone import prediction
from written import N, inputs_of, make, send, write, writer_of

from foldcp.boltz.run import Run
from foldcp.output import folders
from foldcp.output import spool as spools

if TYPE_CHECKING:
    from parity import Prepared


@pytest.fixture
def run() -> Iterator[Run]:
    """A prediction under way on one rank."""
    with prediction() as made:
        yield made


@pytest.fixture
def inputs(prepared: Callable[[str], Prepared]) -> SimpleNamespace:
    """See `written.inputs_of`."""
    return inputs_of(prepared("heterodimer"))


@contextmanager
def file_limit(count: int) -> Iterator[None]:
    """No file may grow beyond `count` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("when", ["raw", "packing", "stock", "before"])
def test_full_disk_fails_one_input(
    when: str,
    inputs: SimpleNamespace,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = writer_of(inputs, tmp_path)
    batch, prediction = make(inputs)
    del prediction["z"]
    name = batch["record"][0].id
    reason = os.strerror(errno.EFBIG)
    if when == "raw":
        with file_limit(N * N * 2):
            assert send(ours, prediction, name)
        write(ours, prediction, batch)
    elif when == "stock":
        assert send(ours, prediction, name)
        with file_limit(1000):
            write(ours, prediction, batch)
    elif when == "packing":
        reason = os.strerror(errno.ENOSPC)

        def full(*args: Any) -> None:
            raise OSError(errno.ENOSPC, reason)

        with monkeypatch.context() as patch:
            patch.setattr(spools.np.lib.format, "write_array_header_1_0", full)
            assert send(ours, prediction, name)
            write(ours, prediction, batch)
            ours._outputs.finish()
    else:
        reason = "its matrices need 0.000144 GB of disk and 1e-08 GB are free"
        with monkeypatch.context() as patch:
            usage = SimpleNamespace(free=10)
            patch.setattr(folders.shutil, "disk_usage", lambda path: usage)
            assert not send(ours, prediction, name)
        write(ours, {"exception": True}, batch)
    second, again = make(inputs)  # the same run goes on, here with the same input
    del again["z"]
    ours._outputs.finish()
    assert list(run.failed) == [name] and reason in run.failed[name], run.failed
    assert "free the disk or pass another --out_dir" in run.failed[name]
    assert list((tmp_path / "predictions").iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["predictions"]
    assert send(ours, again, name)
    write(ours, again, second)
    ours.on_predict_epoch_end(None, None)
    assert (tmp_path / "predictions" / name / f"pde_{name}_model_2.npz").exists()


def test_run_with_a_full_disk_names_the_input_and_completes_the_others(
    tiny_cache: Path, tmp_path: Path
) -> None:
    """`boltz predict` itself; the pair embedding of the long chain is what finds no room."""
    (tmp_path / "in").mkdir()
    for name, length in (("long", 60), ("short", 8)):
        chain = f"  - protein: {{id: A, sequence: {'MK' * (length // 2)}, msa: empty}}\n"
        (tmp_path / "in" / f"{name}.yaml").write_text(f"version: 1\nsequences:\n{chain}")
    options = "--accelerator cpu --num_workers 0 --sampling_steps 2 --recycling_steps 0 --seed 1"
    boltz = str(Path(sys.executable).with_name("boltz"))
    places = ["--out_dir", str(tmp_path), "--cache", str(tiny_cache), "--write_embeddings"]
    command = [boltz, "predict", str(tmp_path / "in"), *options.split(), *places]
    folder = tmp_path / "boltz_results_in" / "predictions"

    def predict(limit: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            env={**os.environ, "FOLDCP": "1"},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
            capture_output=True,
            text=True,
        )

    ended = predict(100_000)
    assert ended.returncode == 1, ended.stderr
    (message,) = (x for x in ended.stderr.splitlines() if x.startswith("foldcp: "))
    assert "1 input(s) could not be folded: long (it could not be written to" in message
    assert f"({os.strerror(errno.EFBIG)}): free the disk or pass another --out_dir" in message
    assert [path.name for path in folder.iterdir()] == ["short"]
    assert not list(folder.parent.glob(".partial_*"))
    before = (folder / "short" / "short_model_0.cif").stat().st_mtime_ns
    assert predict(resource.RLIM_INFINITY).returncode == 0
    assert (folder / "short" / "short_model_0.cif").stat().st_mtime_ns == before
    embeddings = np.load(folder / "long" / "embeddings_long.npz")
    assert embeddings["z"].shape[:3] == (1, 60, 60) and len(embeddings["s"][0]) == 60
