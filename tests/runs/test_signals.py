"""SIGTERM, Ctrl-C and killed processes under `foldcp run`: all end in seconds, nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

PROTEIN = "version: 1\nsequences:\n  - protein: {id: A, sequence: MQIFVKTLTG, msa: empty}\n"
# More steps than the test lasts, and workers that must not be left behind.
ENDLESS = "--accelerator cpu --num_workers 2 --sampling_steps 20000 --recycling_steps 0 --seed 1"
KEPT = "finished predictions are kept and skipped by the next run of the same command (with "
KEPT += "FOLDCP_RESUME=DIR also the trunk of an unfinished one)"
LOOPBACK = "0100007F"
CASES = {  # what gets which signal -> exit code and what is said
    "Ctrl-C": ("group", signal.SIGINT, 130, f"interrupted; {KEPT}"),
    "SIGTERM": ("launcher", signal.SIGTERM, 143, f"ended by SIGTERM; {KEPT}"),
    "killed rank": ("rank 1", signal.SIGKILL, 1, "rank 1 (in diffusion of one) is gone: its proc"),
    "killed launcher": (
        "launcher",
        signal.SIGKILL,
        -9,
        "lost the launcher, which served the store",
    ),
}


def _running(mark: str) -> list[int]:
    """Processes whose environment carries a mark."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            marked = mark.encode() in (folder / "environ").read_bytes().split(b"\0")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if marked and state != "Z":
            found.append(int(folder.name))
    return found


def _rank(mark: str, rank: int) -> int:
    wanted = f"\0RANK={rank}\0".encode()
    ranks = [p for p in _running(mark) if wanted in Path(f"/proc/{p}/environ").read_bytes()]
    return min(ranks)  # its workers came later


def _listening(pids: list[int]) -> set[str]:
    """Addresses (hexadecimal, as the kernel shows them) on which some processes listen."""
    own = set()
    for file in (file for pid in pids for file in Path(f"/proc/{pid}/fd").iterdir()):
        with suppress(FileNotFoundError):  # closed meanwhile
            own.add(os.readlink(file))
    rows = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path("/proc/net", name).read_text().splitlines()[1:]
    ]
    return {r[1].partition(":")[0] for r in rows if r[3] == "0A" and f"socket:[{r[9]}]" in own}


def _hear() -> None:
    """Take signals that who started the tests ignores, as a shell does in the background."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize("case", CASES)
def test_everything_ends(case: str, tmp_path: Path, tiny_cache: Path) -> None:
    who, number, code, said = CASES[case]
    (tmp_path / "one.yaml").write_text(PROTEIN)
    mark = f"TEST_OF_FOLDCP={tmp_path}"
    name, _, value = mark.partition("=")
    shared = set(os.listdir("/dev/shm"))
    places = ["--out_dir", str(tmp_path), "--cache", str(tiny_cache)]
    command = [sys.executable, "-m", "foldcp", "run", "--nproc", "2", "predict"]
    log = tmp_path / "log"
    shown = tmp_path / "shown"
    with log.open("w") as stderr, shown.open("w") as stdout:
        launcher = subprocess.Popen(
            [*command, str(tmp_path / "one.yaml"), *ENDLESS.split(), *places],
            env={**os.environ, "FOLDCP": "1", "OMP_NUM_THREADS": "1", name: value},
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            preexec_fn=_hear,
        )
    try:
        until = time.monotonic() + 120
        while "one: sampling" not in shown.read_text() and time.monotonic() < until:
            time.sleep(0.1)
        assert _listening(_running(mark)) == {LOOPBACK}, "other machines can reach a port"
        time.sleep(0.5)
        struck = time.monotonic()
        if who == "group":
            os.killpg(launcher.pid, number)
        else:
            os.kill(launcher.pid if who == "launcher" else _rank(mark, 1), number)
        assert launcher.wait(30) == code, log.read_text()[-3000:]
        while _running(mark) and time.monotonic() < struck + 10:
            time.sleep(0.1)
        assert not _running(mark)
        assert time.monotonic() - struck < 10
    finally:
        for pid in _running(mark):
            os.kill(pid, signal.SIGKILL)
    lines = [line.rpartition("foldcp: ")[2] for line in log.read_text().splitlines()
             if "foldcp: " in line]  # fmt: skip
    assert [line for line in lines if said in line] == lines and lines
    assert case == "killed launcher" or len(lines) == 1
    assert set(os.listdir("/dev/shm")) <= shared
    assert not list((tmp_path / "boltz_results_one" / "predictions").iterdir())


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_while_boltz_is_imported_is_one_line(ranks: int, tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(PROTEIN)
    slow = tmp_path / "pytorch_lightning"  # which Boltz imports
    slow.mkdir()
    begun = tmp_path / "begun"
    code = f"import pathlib, time; pathlib.Path({str(begun)!r}).touch(); time.sleep(60)"
    (slow / "__init__.py").write_text(code)
    launcher = subprocess.Popen(
        [str(Path(sys.executable).with_name("boltz")), "predict", "one.yaml", *ENDLESS.split()],
        env={**os.environ, "FOLDCP": "1", "FOLDCP_NPROC": str(ranks), "PYTHONPATH": str(tmp_path)},
        stderr=subprocess.PIPE, cwd=tmp_path, start_new_session=True, preexec_fn=_hear, text=True,
    )  # fmt: skip
    until = time.monotonic() + 60
    while not begun.exists() and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(1.0)
    os.killpg(launcher.pid, signal.SIGINT)
    said = launcher.communicate(timeout=60)[1]
    assert launcher.returncode == 130 and said == f"foldcp: interrupted; {KEPT}\n", said
