"""The engine's waits are enough, and each is needed: ranks simulated on CPU threads, no GPU.

native/simulator runs the engine of csrc/engine, unchanged, on what exchanges ask of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from native import CSRC, SOURCES
from simulator_input import write_programs

MESHES = [(1, 2), (2, 2), (2, 3), (3, 3), (2, 4)]
CARRIERS = ("mailbox", "copy")
KINDS = ("sources", "buffers", "arrived", "landed")  # in the order of the simulator's counts
STRATEGIES = [
    f"{op}-{route}" for op in ("multiplication", "attention") for route in ("direct", "ring")
] + ["channel", "rows"]
OTHERS = ["root", "given-up", "adjoint"]
TRIALS = 200  # of a mesh and program, half of them by each carrier
MUTANT_TRIALS = 50
LEAST = 3  # wrong trials of a mutant: it is a matter of timing; 13 to 50 were seen
AT_ONCE = 8  # processes: they sleep most of the time

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile")


@dataclass(frozen=True)
class Result:
    """What the simulator printed of a program, and the reports of the thread sanitizer."""

    trials: int
    wrong: int
    stuck: int
    waits: tuple[int, ...]  # by kind
    reports: str


Programs = Callable[[int, int], dict[str, Path]]


@pytest.fixture(scope="session")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The simulator, plain and under the thread sanitizer."""
    folder = tmp_path_factory.mktemp("simulator")
    options = {"plain": ["-O2"], "tsan": ["-O1", "-g", "-fsanitize=thread"]}
    sources = [SOURCES / "simulator" / "simulator.cpp", CSRC / "wire" / "view.cpp"]
    command = ["g++", "-std=c++20", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{CSRC}"]
    command += sources
    under_way = {
        name: subprocess.Popen(
            [*command, *flags, "-o", folder / name], stderr=subprocess.PIPE, text=True
        )
        for name, flags in options.items()
    }
    for name, process in under_way.items():
        said = process.communicate()[1]
        assert process.returncode == 0, f"{name}: {said}"
    return {name: folder / name for name in options}


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    """The programs of a mesh, by name."""
    folder, made = tmp_path_factory.mktemp("programs"), {}

    def of(rows: int, cols: int) -> dict[str, Path]:
        if (rows, cols) not in made:
            made[rows, cols] = write_programs(folder, rows, cols)
        return made[rows, cols]

    return of


def simulate(
    binary: Path, program: Path, carrier: str, trials: int, mutant: str = "none"
) -> Result:
    """Run the simulator on one program."""
    command = [str(binary), str(trials), "1", carrier, mutant, str(program)]
    if binary.name == "tsan":
        command = [*_fixed_addresses(), *command]
    env = {**os.environ, "TSAN_OPTIONS": "exitcode=0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert words[1:8:2] == ["trials", "wrong", "stuck", "waits"], done.stdout
    return Result(*map(int, words[2:7:2]), tuple(map(int, words[8:])), done.stderr)


def _fixed_addresses() -> list[str]:
    """Prefix without which the thread sanitizer fails where addresses are too random."""
    found = shutil.which("setarch")
    if found and subprocess.run([found, "-R", "true"], capture_output=True).returncode == 0:
        return [found, "-R"]
    return []


def _all(jobs: dict[str, tuple]) -> dict[str, Result]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(jobs, pool.map(lambda job: simulate(*job), jobs.values()), strict=True))


def _bad(results: dict[str, Result]) -> list[str]:
    return [f"{k}: {r}" for k, r in results.items() if r.wrong or r.stuck or r.reports]


def _names(rows: int, cols: int) -> Iterable[str]:
    return STRATEGIES + (OTHERS if rows * cols <= 6 else [])


@pytest.mark.parametrize("rows,cols", MESHES)
def test_no_trial_is_wrong(
    rows: int, cols: int, binaries: dict[str, Path], programs: Programs
) -> None:
    files = programs(rows, cols)
    jobs = {
        f"{name} by {carrier}": (binaries["plain"], files[name], carrier, TRIALS // 2)
        for name in _names(rows, cols)
        for carrier in CARRIERS
    }
    results = _all(jobs)
    assert not _bad(results)
    assert all(r.trials == TRIALS // 2 for r in results.values())


def _needed(kind: str, name: str, result: Result) -> str | None:
    """What is wrong with the outcome of a mutant."""
    if result.waits[KINDS.index(kind)] == 0:
        return f"{name}: the engine has no wait {kind}"
    if result.wrong < LEAST:
        return f"{name}: without {kind} only {result.wrong} of {result.trials} are wrong"
    return None


# Exchanges of one step (`channel`) have nothing to wait for in a second one, those of two steps (on
# smaller meshes) use each buffer once. `stream` lets every step arrive before it lands; gradients
# and exchanges that are given up do not.
@pytest.mark.parametrize(
    "kind,mesh,names",
    [
        ("sources", (2, 3), STRATEGIES),
        ("buffers", (2, 3), [name for name in STRATEGIES if name != "channel"]),
        ("arrived", (2, 3), STRATEGIES),
        ("landed", (2, 2), ["adjoint"]),
    ],
)
def test_every_wait_is_needed(
    kind: str,
    mesh: tuple[int, int],
    names: list[str],
    binaries: dict[str, Path],
    programs: Programs,
) -> None:
    files = programs(*mesh)
    jobs = {
        name: (binaries["plain"], files[name], "mailbox", MUTANT_TRIALS, kind) for name in names
    }
    results = _all(jobs)
    print(kind, {k: r.wrong for k, r in results.items()})
    problems = [_needed(kind, name, result) for name, result in results.items()]
    assert not [p for p in problems if p]


# Where both ranks of a pair send alike, what a send needs follows from what was received before;
# ranks that only send to rank 0 have nothing else to wait for. Streams of the peers are forked and
# joined where there are several.
@pytest.mark.parametrize(
    "wait,names",
    [
        ("flag-arrived", [*STRATEGIES, "root"]),
        ("flag-free", ["root"]),
        ("fork", STRATEGIES),
        ("join", STRATEGIES),
    ],
)
def test_the_copy_protocol_needs_its_waits(
    wait: str, names: list[str], binaries: dict[str, Path], programs: Programs
) -> None:
    files = programs(2, 2)
    jobs = {name: (binaries["plain"], files[name], "copy", MUTANT_TRIALS, wait) for name in names}
    results = _all(jobs)
    print(wait, {k: (r.wrong, r.stuck) for k, r in results.items()})
    assert not [f"{k}: {r}" for k, r in results.items() if r.wrong < LEAST]


def test_there_is_no_data_race(binaries: dict[str, Path], programs: Programs) -> None:
    jobs = {
        f"{name} {rows}x{cols} by {carrier}": (
            binaries["tsan"], programs(rows, cols)[name], carrier, 10
        )
        for rows, cols in ((2, 2), (2, 3))
        for name in _names(rows, cols)
        for carrier in CARRIERS
    }  # fmt: skip
    assert not _bad(_all(jobs))


def test_the_sanitizer_sees_a_missing_wait(binaries: dict[str, Path], programs: Programs) -> None:
    files = programs(2, 2)
    jobs = {
        "wait": (binaries["tsan"], files["multiplication-ring"], "mailbox", 5, "arrived"),
        "flag": (binaries["tsan"], files["multiplication-ring"], "copy", 5, "flag-arrived"),
    }
    for name, result in _all(jobs).items():
        assert "ThreadSanitizer: data race" in result.reports, name
