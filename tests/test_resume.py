"""FOLDCP_RESUME: a run that dies in sampling goes on from the trunk; damaged files are refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import Case, Ended, run_cases

from foldcp import resume

PROTEIN = "version: 1\nsequences:\n  - protein: {id: A, sequence: MQIFVKTLTGKT, msa: empty}\n"
FAST = "--accelerator cpu --num_workers 0 --sampling_steps 8 --recycling_steps 1"


def test_a_file_comes_back_or_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.trunk"
    tensors = {
        "z": torch.randn(1, 5, 3, 4)[:, :, ::2],
        "half": torch.randn(7).bfloat16(),
        "state": torch.get_rng_state(),
        "empty": torch.empty(0, 3),
    }
    assert resume.load(path, torch.device("cpu")) is None
    resume.save(path, tensors)
    back = resume.load(path, torch.device("cpu"))
    assert back is not None and back.keys() == tensors.keys()
    assert all(torch.equal(back[k], x) and back[k].dtype == x.dtype for k, x in tensors.items())
    assert [p.name for p in path.parent.iterdir()] == ["x.trunk"]
    whole = path.read_bytes()
    for at in (0, 20, 60, whole.index(b"\n", 20) + 9, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(resume.Damaged, match="x.trunk is "):
            resume.load(path, torch.device("cpu"))
    for cut in (whole[:-1], whole[:200], whole + b"x", b""):
        path.write_bytes(cut)
        with pytest.raises(resume.Damaged):
            resume.load(path, torch.device("cpu"))


def test_the_key_follows_every_part() -> None:
    feats = {"a": torch.arange(4), "b": torch.zeros(2)}
    keys = {resume.key({"seed": 1}, feats), resume.key({"seed": 2}, feats),
            resume.key({"seed": 1}, {**feats, "a": torch.arange(4).int()}),
            resume.key({"seed": 1}, {**feats, "b": torch.ones(2)})}  # fmt: skip
    assert len(keys) == 4
    assert resume.key({"seed": 1}, dict(reversed(feats.items()))) in keys


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def ends(folder: Path, small_cache: Path) -> dict[str, Ended]:
    (folder / "one.yaml").write_text(PROTEIN)

    def predict(out: str, *more: str) -> list[str]:
        places = ["--out_dir", str(folder / out), "--cache", str(small_cache)]
        return ["predict", str(folder / "one.yaml"), *FAST.split(), *places, *more]

    def kept(name: str) -> dict[str, str]:
        return {"FOLDCP_RESUME": str(folder / f"kept {name}")}

    seed = ("--seed", "3")
    ends = run_cases({
        "whole": Case(predict("whole", *seed), 4, rig="real"),
        "dies": Case(predict("out", *seed), 4, kept("a"), rig="at sampler kill 2 0"),
    })  # fmt: skip
    assert len(list((folder / "kept a").rglob("*.trunk"))) == 4
    shutil.copytree(folder / "kept a", folder / "kept b")
    shutil.copytree(folder / "kept a", folder / "kept c")
    victim = next((folder / "kept b").rglob("rank1of4.trunk"))
    data = bytearray(victim.read_bytes())
    data[-100] ^= 1
    victim.write_bytes(data)
    # A trunk that is computed after all kills the run: so one that succeeds has taken the file.
    no_trunk = "at start kill 1 0"
    return ends | run_cases({
        "goes on": Case(predict("out", *seed), 4, kept("a"), rig=no_trunk),
        "damaged": Case(predict("damaged", *seed), 4, kept("b"), rig="real"),
        "other seed": Case(predict("other", "--seed", "4"), 4, kept("c"), rig=no_trunk),
    })  # fmt: skip


def _outputs(folder: Path, out: str) -> dict[str, np.ndarray]:
    found = (folder / out / "boltz_results_one" / "predictions" / "one").glob("*.npz")
    arrays = {}
    for path in found:
        with np.load(path) as file:
            arrays |= {f"{path.name} {key}": file[key] for key in file}
    return arrays


def test_goes_on_from_the_trunk(folder: Path, ends: dict[str, Ended]) -> None:
    assert ends["dies"].codes[2] == -9
    assert ends["goes on"].codes == [0] * 4, ends["goes on"]
    assert "the trunk is taken from" in ends["goes on"].stdout[0]
    whole, resumed = _outputs(folder, "whole"), _outputs(folder, "out")
    assert len(whole) == 3 and all(np.array_equal(whole[k], resumed[k]) for k in whole)
    assert not list((folder / "kept a").rglob("*"))  # the prediction is on disk


def test_a_damaged_file_is_refused(folder: Path, ends: dict[str, Ended]) -> None:
    end = ends["damaged"]
    (message,) = end.messages()
    assert end.codes == [0] * 4 and "rank1of4.trunk is damaged (its checksum differs)" in message
    assert "it is not used, and the trunk is computed again" in message
    whole, again = _outputs(folder, "whole"), _outputs(folder, "damaged")
    assert all(np.array_equal(whole[k], again[k]) for k in whole)


def test_another_seed_does_not_take_it(ends: dict[str, Ended]) -> None:
    assert ends["other seed"].codes[1] == -9  # it computed its own trunk
