"""bench/gpu/run.sh: all of it in tiny sizes, its limits, and what a part that goes wrong leaves."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from bench import block, machine, shapes
from bench.gpu import cases, correctness
from bench.gpu.cases import Case

FOLDER = machine.ROOT / "bench" / "gpu"
TABLE = machine.ROOT / "bench" / "results" / "compile.csv"
ORDER = ["correctness", "engine", "predict", "core", "block", "graph", "tune"]
NAMED = {"kernels", "peers"}  # only when they are asked for
# What the device machine brings back: files, and bytes of each.
FILES, BYTES = 8, 16 << 20


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def limits() -> dict[str, int]:
    """Seconds of every part, in the order of the script."""
    return {
        name: int(limit)
        for name, limit in re.findall(
            r"^ *part (\w+) (\d+) ", (FOLDER / "run.sh").read_text(), re.M
        )
    }


def script(
    out: Path, parts: Sequence[str], path: str = "", **env: str
) -> subprocess.CompletedProcess:
    """Run the script as on the device machine: from a copy of the tree without git and packages."""
    return subprocess.run(
        ["bash", str(FOLDER / "run.sh")], capture_output=True, text=True, timeout=590,
        env=os.environ | {"PYTHON": sys.executable, "OUT": str(out), "PARTS": " ".join(parts),
                          "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **env},
    )  # fmt: skip


def summary(out: Path) -> dict[str, str]:
    """name -> the rest of its line, which says how long it took or that it was left out."""
    line = re.compile(r"(\w+) +(\d+ s .*|left out: .*)")
    found = (line.fullmatch(x) for x in (out / "summary.txt").read_text().splitlines())
    return {x[1]: x[2] for x in found if x}


def test_limits_leave_room() -> None:
    found = limits()
    assert [x for x in found if x not in NAMED] == ORDER and set(found) == {*ORDER, *NAMED}
    # Each part may take 2 s more to die; unpacking, importing and packing take the rest.
    assert sum(found[x] + 2 for x in ORDER) <= 540 - 4
    assert all(found[x] <= 500 for x in NAMED)
    # A part that runs until its time is up is told so by the script.
    text = (FOLDER / "run.sh").read_text().split("part correctness", 1)[1]
    assert set(re.findall(r"--within ([^\s\")]+)", text)) == {"WITHIN", "5"}


def test_the_cases_of_a_first_session_fit_their_time() -> None:
    """By what compiling them took here (bench.gpu.compile_time), twice over."""
    chosen = [case.name for case in correctness.cases(fast=False)]
    assert len(set(chosen)) == len(chosen)
    seconds = {r["case"]: float(r["seconds"]) for r in read(TABLE)}
    assert list(seconds) == chosen, "run python -m bench.gpu.compile_time"
    workers = correctness.MOST_WORKERS
    # Starting a process on the GPU, running a case (definition in float64 included).
    need = 15 + (2 * sum(seconds.values()) + 1.0 * len(chosen)) / workers
    assert need <= limits()["correctness"] - 20
    # Every op in every mode where blocks are whole and where they are cut.
    for mode in cases.MODES:
        for n in (cases.EVEN, cases.ODD):
            assert {f"op {x} {mode} {n}" for x in shapes.OPS} <= set(chosen)
    assert cases.EVEN % 128 == 0 and cases.ODD % 2 == 1
    assert all(len(g.reason) > 20 for g in cases.GROUPS)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the whole script leaves when it runs in tiny sizes."""
    out = tmp_path_factory.mktemp("rehearsal")
    done = script(out, ORDER, FAST="1")
    (out / "stdout").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return out


def tables(out: Path) -> Path:
    """The folder of tables, as it is unpacked into bench/results."""
    with tarfile.open(out / "results.tar.gz") as archive:
        archive.extractall(out / "unpacked", filter="data")
    return out / "unpacked" / machine.results_folder().name


def test_every_part_is_rehearsed_in_order(rehearsal: Path) -> None:
    lines = summary(rehearsal)
    assert list(lines) == ORDER
    for name, line in lines.items():
        assert re.match(r"\d+ s ok: ", line), f"{name}: {line}"
    left = [x for x in rehearsal.iterdir() if x.name not in ("stdout", "unpacked")]
    assert {x.name for x in left} == {"summary.txt", "log.txt", "results.tar.gz"}
    assert len(left) <= FILES and max(x.stat().st_size for x in left) < BYTES
    folder = tables(rehearsal)
    made = {x.stem for x in folder.glob("*.csv")}
    assert {"correctness", "engine", "predict", "kernels_core", "block", "graph", "tune"} <= made
    for name in made:
        (commit,) = {r["commit"] for r in read(folder / f"{name}.csv")}
        assert commit in (rehearsal / "summary.txt").read_text().splitlines()[0], name
    statuses = {r["case"]: r["status"] for r in read(folder / "correctness.csv")}
    assert statuses.pop("graph failed") == "left out" and set(statuses.values()) == {"ok"}
    checks = read(folder / "engine.csv")
    assert len(checks) >= 4 * 40 and all(r["ok"] == "True" for r in checks)


def test_block_and_predict_agree_with_stock_before_they_are_timed(rehearsal: Path) -> None:
    """The pairformer block, a diffusion step, the token transformer, and a whole prediction."""
    folder = tables(rehearsal)
    rows = {(r["part"], r["side"]): r for r in read(folder / "block.csv")}
    for part in block.PARTS:
        row = rows[part, "foldcp"]
        assert row["status"] == "ok" and float(row["ms"]) > 0
        # Not the very same code, and not another function.
        assert 0 < float(row["error"]) < 1e-4
    rows = {r["side"]: r for r in read(folder / "predict.csv")}
    ours = rows["foldcp"]
    assert ours["status"] == "ok" and float(ours["seconds"]) > 0 and ours["boltz"] == "2.2.1"
    assert 0 < float(ours["structure"]) < float(ours["structure_bound"])
    assert 0 < float(ours["plddt"]) < float(ours["plddt_bound"])
    ratio = float(rows["stock"]["seconds"]) / float(ours["seconds"])
    assert float(ours["speedup_over_stock"]) == pytest.approx(ratio, rel=0.02)


BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {
            "boltz", "rdkit", "gemmi", "Bio", "pytorch_lightning", "lightning_fabric", "yaml",
            "torchmetrics", "omegaconf", "einops", "scipy", "pandas", "matplotlib", "click",
            "pytest", "hydra", "numba", "sklearn", "requests", "tqdm",
        }:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def test_a_machine_with_torch_triton_and_numpy_alone(tmp_path: Path) -> None:
    """Parts that need Boltz say so in a line; all others can be imported, and run."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    modules = ("gpu.correctness", "gpu.cases", "gpu.graph_cases", "gpu.engine", "kernels", "tune")
    code = "import " + ", ".join(f"bench.{m}" for m in modules)
    env = os.environ | {"PYTHONPATH": f"{machine.ROOT}:{tmp_path}"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=machine.ROOT)
    done = script(tmp_path / "out", ORDER[2:6], str(tmp_path), FAST="1")
    lines = summary(tmp_path / "out")
    assert done.returncode == 0 and list(lines) == ORDER[2:6], done.stdout[-2000:]
    for name in ("predict", "block", "graph"):
        assert lines[name].startswith("left out: no boltz (ModuleNotFoundError"), lines[name]
    assert " ok: " in lines["core"]


FAKE = """#!/bin/bash
case "$*" in
  *results_folder*) echo gpu-fake ;;
  *describe*) echo abc1234 ;;
  *bench.gpu.engine*)
    for i in $(seq 40); do echo "line $i"; done
    exec {python} -c 'raise ValueError("planted")' ;;
  *bench.block*) exec {python} -c 'import time
def hangs(): time.sleep(60)
hangs()' ;;
  *bench.kernels*) exit 3 ;;
  *) exit 0 ;;
esac
"""


def test_a_part_that_goes_wrong_says_so_and_the_next_one_runs(tmp_path: Path) -> None:
    """One raises, one says nothing, one hangs until the script's time is up."""
    python = tmp_path / "python"
    python.write_text(FAKE.replace("{python}", sys.executable))
    python.chmod(0o755)
    out, start = tmp_path / "out", time.monotonic()
    done = script(out, ("engine", "core", "block", "graph"), PYTHON=str(python), LIMIT="14")
    assert done.returncode == 1 and time.monotonic() - start < 40
    lines, log = summary(out), (out / "log.txt").read_text()
    assert re.match(r"\d+ s failed \(exit 1\): ValueError: planted", lines["engine"])
    assert re.match(r"\d+ s failed \(exit 3\):", lines["core"])
    assert "stopped after" in lines["block"] and "Fatal Python error: Aborted" in lines["block"]
    assert lines["graph"] == "left out: no time"
    assert "line 1\n" in log and "in hangs" in log  # where it hung
    assert "line 40" in done.stdout and "line 20\n" not in done.stdout  # the last lines
    assert (
        (out / "summary.txt").read_text().splitlines()[-1].endswith("not right: engine core block")
    )
    assert (out / "results.tar.gz").is_file() and len(list(out.iterdir())) == 3


ANSWERS = """
import os, sys, time
print("ready", flush=True)
for line in sys.stdin:
    what = line.split()[1]
    if what == "hangs":
        def stuck(): time.sleep(60)
        stuck()
    if what == "dies":
        print("CUDA error: an illegal memory access", file=sys.stderr)
        sys.exit(7)
    status = "wrong" if what == "wrong" else "ok"
    print('{"status": "%s", "error": 0.5, "bound": 1, "reason": "%d"}' % (status, os.getpid()),
          flush=True)
"""


def test_a_case_that_hangs_or_dies_costs_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(correctness, "CASE_LIMIT", 1.5)
    todo = [Case("op", x) for x in ("a", "b", "hangs", "c", "dies", "d", "wrong", "e")]
    session = correctness.Session(todo, 0.0, tmp_path / "correctness.csv")
    session.work([sys.executable, "-c", ANSWERS])
    rows = {r["case"].split()[1]: r for r in read(tmp_path / "correctness.csv")}
    status = {name: r["status"] for name, r in rows.items()}
    assert status == dict.fromkeys("abcde", "ok") | {
        "hangs": "timeout", "dies": "failed", "wrong": "wrong"
    }  # fmt: skip
    assert "stuck" in rows["hangs"]["reason"] and "illegal memory" in rows["dies"]["reason"]
    # The same process goes on while all is right, and another takes over where it is not.
    process = [rows[x]["reason"] for x in ("a", "b", "c", "d", "wrong", "e")]
    assert process[0] == process[1] and process[3] == process[4] and len(set(process)) == 4
    late = correctness.Session(todo[:2], 1e-9, tmp_path / "late.csv")
    late.work([sys.executable, "-c", ANSWERS])
    assert {r["status"] for r in late.rows.values()} == {"skipped"}


@pytest.mark.parametrize("kind", ["op", "gradient"])
def test_a_wrong_kernel_is_seen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = Case(kind, "transition_pair", "fp32", 7)
    right = cases.check(case, device)
    assert right["status"] == "ok" and 0 < right["error"] <= right["bound"] < 1e-3
    shipped = cases.FOLDCP[case.what]
    off = lambda t, impl: lambda: shipped(t, impl)() * (1 + 3e-3)  # noqa: E731
    monkeypatch.setitem(cases.FOLDCP, case.what, off)
    found = cases.check(case, device)
    assert found["status"] == "wrong" and f"{found['error']:.2e}" in found["reason"]
