"""Faults inside a prediction on 2x2: memory, killed and stopped ranks, signals, a full disk.

Each case runs Boltz's command on four forked ranks over two inputs and goes wrong on cue (rigs.py).
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

import pytest
from forked import Case, Ended, run_cases

pytestmark = pytest.mark.timed
PROTEIN = "version: 1\nsequences:\n  - protein: {id: A, sequence: MQIFVKTLTG, msa: empty}\n"
WITH_ION = PROTEIN + "  - ligand: {id: B, ccd: MG}\n"
FAST = "--accelerator cpu --num_workers 0 --sampling_steps 4 --recycling_steps 0 --seed 1"
TRANSPORTS = ("host", "gloo")
# Place, deed and rank of what happens in the first input; where the message says that it did.
MEMORY = {
    "trunk": ("oom 1", "recycle 1/1 of first"),
    "ring": ("oom 3", "recycle 1/1 of first"),
    "sampler": ("host-oom 2", "diffusion of first"),
    "confidence": ("oom 0", "confidence of first"),
    "writer": ("oom 0", "writing of first"),
}
# Deeds of a rank in the second input, and what the message of the others says.
LOST = {
    "kill": ("at sampler kill 2 1", "rank 2 (in diffusion of second) is gone"),
    "stop": ("at trunk stop 1 1", "rank 1 (in "),
    "hang": ("at sampler hang 3 1", "rank 3 (in diffusion of second) does not go on"),
    "raise": ("at confidence raise 3 1", "rank 3 failed in confidence of second (RuntimeError"),
}
# How many files find room, where, and what is said: below the results, then for temporary files.
FEW = {
    "few folders": (6, "FOLDER", "free the disk or pass another --out_dir; not folded: first.yaml, "
                    "second.yaml; finished predictions are kept"),
    "few files": (19, "FOLDER", "2 input(s) could not be folded:\n  "),
    "no temporary files": (0, f"{tempfile.gettempdir()}/foldcp_", "free the disk or name another "
                           "folder with TMPDIR; finished predictions are kept"),
}  # fmt: skip
DEADLINE = 4  # FOLDCP_TIMEOUT where a rank stops or hangs
# Through gloo those that differ: a fault inside an exchange, outside of one, and processes.
CHOSEN = {"host": {*MEMORY, *LOST}, "gloo": {"ring", "writer", "kill", "stop", "hang"}}
PLACES = [(t, place) for t in TRANSPORTS for place in MEMORY if place in CHOSEN[t]]
DEEDS = [(t, deed) for t in TRANSPORTS for deed in LOST if deed in CHOSEN[t]]


def _cases(folder: Path, cache: Path) -> dict[str, Case]:
    (folder / "pair").mkdir()
    (folder / "pair" / "first.yaml").write_text(PROTEIN)
    (folder / "pair" / "second.yaml").write_text(WITH_ION)

    def predict(out: str) -> list[str]:
        places = ["--out_dir", str(folder / out), "--cache", str(cache)]
        return ["predict", str(folder / "pair"), *FAST.split(), *places]

    cases = {}
    for transport in TRANSPORTS:
        env = {"FOLDCP_TRANSPORT": transport}
        for place in [p for t, p in PLACES if t == transport]:
            deed = MEMORY[place][0]
            name = f"{transport} {place}"
            cases[name] = Case(predict(name), 4, env, rig=f"at {place} {deed} 0")
        soon = env | {"FOLDCP_TIMEOUT": str(DEADLINE)}
        for deed in [d for t, d in DEEDS if t == transport]:
            name, rig = f"{transport} {deed}", LOST[deed][0]
            cases[name] = Case(predict(name), 4, soon if deed in ("stop", "hang") else env, rig=rig)
        name = f"{transport} nap"
        cases[name] = Case(predict(name), 4, env, rig="at sampler nap 3 1")
        name = f"{transport} full"
        cases[name] = Case(predict(name), 4, env, rig="at writer full 0 0")
        again = f"{transport} kill"
        cases[f"{transport} again"] = Case(predict(again), 4, env, rig="real")
    for name, (count, start, _) in FEW.items():
        start = start.replace("FOLDER", str(folder / name))
        cases[name] = Case(predict(name), 2, rig=f"files {count} {start}")
    one = {"FOLDCP_TRANSPORT": "auto"}
    cases["alone"] = Case(predict("alone"), 1, one, rig="at sampler oom 0 0")
    return cases


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def ends(folder: Path, small_cache: Path) -> dict[str, Ended]:
    shared = set(os.listdir("/dev/shm"))
    ends = run_cases(_cases(folder, small_cache))
    assert set(os.listdir("/dev/shm")) <= shared
    return ends


def _times(end: Ended, what: str) -> list[float]:
    """When something happened on the ranks, see `rigs._note`."""
    return [float(t) for text in end.stderr for t in re.findall(rf"rig: {what} ([\d.]+)", text)]


def _written(folder: Path, out: str, clean: bool = True) -> set[str]:
    # A run that ends at once leaves its work behind; the next one clears it away.
    assert not clean or not list((folder / out).glob("boltz_results_pair/**/.partial*"))
    found = (folder / out).glob("boltz_results_pair/predictions/*/*_model_0.cif")
    return {path.parent.name for path in found}


@pytest.mark.parametrize(("transport", "place"), PLACES)
def test_out_of_memory_costs_one_input(
    folder: Path, ends: dict[str, Ended], transport: str, place: str
) -> None:
    end = ends[f"{transport} {place}"]
    rank = MEMORY[place][0].split()[1]
    assert end.codes == [1, 1, 1, 1] and end.seconds < 30 and end.spread < 5, end
    struck, agreed = _times(end, "struck"), _times(end, "agreed")
    assert len(struck) == 1 and len(agreed) == 4 and max(agreed) - struck[0] < 5
    (message,) = end.messages()
    assert "1 input(s) could not be folded: first (out of memory: 1" in message
    assert f"tokens on mesh 2x2, rank {rank} in {MEMORY[place][1]}: it needed" in message
    assert "GB free; use more ranks (FOLDCP_NPROC), fewer samples" in message
    assert _written(folder, f"{transport} {place}") == {"second"}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_full_disk_costs_one_input(folder: Path, ends: dict[str, Ended], transport: str) -> None:
    end = ends[f"{transport} full"]
    (message,) = end.messages()
    assert end.codes == [1] * 4 and "1 input(s) could not be folded: first (it could not" in message
    assert "(No space left on device): free the disk or pass another --out_dir" in message
    assert _written(folder, f"{transport} full") == {"second"}


@pytest.mark.parametrize("name", FEW)
def test_no_room_for_files_is_said_once(folder: Path, ends: dict[str, Ended], name: str) -> None:
    end = ends[name]
    assert len(end.messages()) == 1  # of several inputs on several lines
    said = "".join(end.stderr)
    assert FEW[name][2] in said and "No space left on device" in said
    assert end.codes == [1, 1] and "Traceback" not in said, end.stderr


def test_out_of_memory_alone(folder: Path, ends: dict[str, Ended]) -> None:
    end = ends["alone"]
    (message,) = end.messages()
    assert end.codes == [1] and "first (out of memory: 10 tokens on mesh 1x1" in message
    assert "needed 21.5 GB more and had " in message
    assert _written(folder, "alone") == {"second"}


@pytest.mark.parametrize(("transport", "deed"), DEEDS)
def test_a_lost_rank_is_named(
    folder: Path, ends: dict[str, Ended], transport: str, deed: str
) -> None:
    end = ends[f"{transport} {deed}"]
    left = [c for r, c in enumerate(end.codes) if f"at trunk stop {r} 1" != LOST[deed][0]]
    expected = {1, -9} if deed == "kill" else {1}
    assert set(left) == expected, end
    messages = end.messages()
    assert len(messages) == 1, end.stderr
    assert LOST[deed][1] in messages[0] and "finished predictions are kept" in messages[0]
    if deed == "stop":
        assert "of second) is stopped (SIGSTOP)" in messages[0]
    again = deed == "kill"  # the case "again" has completed it
    wanted = {"first", "second"} if again else {"first"}
    assert _written(folder, f"{transport} {deed}", clean=again) == wanted


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_rank_that_pauses_costs_nothing(
    folder: Path, ends: dict[str, Ended], transport: str
) -> None:
    end = ends[f"{transport} nap"]
    assert end.codes == [0, 0, 0, 0] and end.seconds > 4 and not end.messages(), end
    assert _written(folder, f"{transport} nap") == {"first", "second"}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_same_command_completes_what_is_missing(
    folder: Path, ends: dict[str, Ended], transport: str
) -> None:
    end = ends[f"{transport} again"]
    assert end.codes == [0, 0, 0, 0], end
    assert "foldcp: 1 folded, 1 skipped as done in " in end.stdout[0]
