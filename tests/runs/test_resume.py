"""FOLDCP_RESUME: a run that dies in sampling goes on from the trunk; damaged files are refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import Case, Ended, run_cases

from foldcp.fabric.mesh import Mesh
from foldcp.modules.settings import Settings
from foldcp.output import trunk_file
from foldcp.output.trunk_keeper import KeptTrunk, TrunkKeeper

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
    assert trunk_file.load(path, torch.device("cpu")) is None
    trunk_file.save(path, tensors)
    back = trunk_file.load(path, torch.device("cpu"))
    assert back is not None and back.keys() == tensors.keys()
    assert all(torch.equal(back[k], x) and back[k].dtype == x.dtype for k, x in tensors.items())
    assert [p.name for p in path.parent.iterdir()] == ["x.trunk"]
    whole = path.read_bytes()
    for at in (0, 20, 60, whole.index(b"\n", 20) + 9, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(trunk_file.Damaged, match="x.trunk is "):
            trunk_file.load(path, torch.device("cpu"))
    for cut in (whole[:-1], whole[:200], whole + b"x", b""):
        path.write_bytes(cut)
        with pytest.raises(trunk_file.Damaged):
            trunk_file.load(path, torch.device("cpu"))


def test_the_key_follows_every_part() -> None:
    feats = {"a": torch.arange(4), "b": torch.zeros(2)}
    keys = {trunk_file.key({"seed": 1}, feats), trunk_file.key({"seed": 2}, feats),
            trunk_file.key({"seed": 1}, {**feats, "a": torch.arange(4).int()}),
            trunk_file.key({"seed": 1}, {**feats, "b": torch.ones(2)})}  # fmt: skip
    assert len(keys) == 4
    assert trunk_file.key({"seed": 1}, dict(reversed(feats.items()))) in keys


LIKE = {"s": ((1, 6, 4), (torch.float32,)), "z": ((1, 6, 6, 8), (torch.float32,))}


def test_a_whole_file_of_something_else_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def begin() -> KeptTrunk:
        feats = {"a": torch.arange(4), "ref_pos": torch.zeros(1, 32, 3)}
        keeper = TrunkKeeper(tmp_path / "kept", {"seed": 1}, Mesh.create(1, 1, "cpu"))
        return keeper.begin(feats, Settings(1, 2, 3))

    kept, s, z = begin(), torch.rand(1, 6, 4), torch.rand(1, 6, 6, 8)
    kept.save(s, z)
    (path,) = tmp_path.rglob("*.trunk")
    good = trunk_file.load(path, torch.device("cpu"))
    found = begin().load(LIKE)
    assert good is not None and found is not None
    assert torch.equal(found[0], s) and torch.equal(found[1], z)
    still = good["cpu_state"].clone()
    still[24 : 24 + 8 * 624] = 0  # it draws nothing but zeros
    wrong = {
        "'s' is missing": {"s": None},
        "'z' is missing": {"z": None},
        "'ref_pos' is missing": {"ref_pos": None},
        "'cpu_state' is missing": {"cpu_state": None},
        "'more' is not part of": {"more": s},
        "s has shape [1, 5, 4], expected [1, 6, 4]": {"s": s[:, :5]},
        "s is torch.float16": {"s": s.half()},
        "s is torch.float64, expected torch.float32": {"s": s.double()},
        "z has shape []": {"z": torch.tensor(1.0)},
        "z is torch.int32": {"z": z.int()},
        "z has NaN": {"z": z.where(z > 0.5, torch.nan)},
        "ref_pos has shape [1, 31, 3]": {"ref_pos": good["ref_pos"][:, :31]},
        "ref_pos has NaN or infinite": {"ref_pos": good["ref_pos"] + torch.inf},
        "cpu_state has shape [100]": {"cpu_state": good["cpu_state"][:100]},
        "cpu_state is torch.float32": {"cpu_state": good["cpu_state"].float()},
        "cpu_state is not the state": {"cpu_state": torch.zeros_like(good["cpu_state"])},
        "it repeats itself": {"cpu_state": still},
    }
    state = torch.get_rng_state()
    for said, change in wrong.items():
        changed = {k: v for k, v in (good | change).items() if v is not None}
        trunk_file.save(path, changed)
        again = begin()
        assert again.load(LIKE) is None, said
        told = capsys.readouterr().err
        assert said in told and str(path) in told, told
        assert "it is not used, and the trunk is computed again" in told
    assert torch.equal(torch.get_rng_state(), state)
    again.save(s, z)
    assert begin().load(LIKE) is not None, "a refused file is written anew"
    for make, what in ((os.mkfifo, "a pipe"), (Path.mkdir, "a folder")):
        path.unlink()
        make(path)
        again = begin()
        assert again.load(LIKE) is None
        assert f"it is {what}, not a regular file" in capsys.readouterr().err
        again.save(s, z)
        again.drop()  # neither waits for a reader nor fails
    path.rmdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path.parent.rmdir()
    path.parent.symlink_to(elsewhere)
    again = begin()
    assert again.load(LIKE) is None and "it leads to" in capsys.readouterr().err
    again.save(s, z)
    assert not list(elsewhere.iterdir())


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
