"""One run of Boltz's command line in a process of its own: its results, time and memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.machine import ROOT


@dataclass(frozen=True)
class Run:
    """One finished run.

    Args:
        prediction: folder of the predicted structure and its confidences.
        seconds: wall time, start-up and loading included.
        peak_bytes: peak resident memory of the largest process.
        sent_bytes: largest number of bytes that a rank sent to others; 0 for stock.
    """

    prediction: Path
    seconds: float
    peak_bytes: int
    sent_bytes: int


def stock(work: Path, arguments: Sequence[str], threads: int) -> Run:
    """Fold with stock Boltz, in float32.

    Args:
        work: folder for results and log.
        arguments: of `boltz predict`; the first one is the input.
        threads: of the process.
    """
    command = [sys.executable, "-m", "bench.stock", "--peak", str(work / "stock.json"), "predict"]
    return _run("stock", work, [*command, *arguments], {"OMP_NUM_THREADS": str(threads)})


def foldcp(work: Path, arguments: Sequence[str], ranks: int, mesh: str, threads: int) -> Run:
    """Fold with foldcp, in float32.

    Args:
        work: folder for results and log.
        arguments: of `boltz predict`; the first one is the input.
        ranks: number of processes.
        mesh: their arrangement, "RxQ".
        threads: of each process.

    Raises:
        RuntimeError: foldcp is not installed in this environment, and stock Boltz ran instead.
    """
    variables = {
        "FOLDCP": "1", "FOLDCP_NPROC": str(ranks), "FOLDCP_MESH": mesh, "FOLDCP_PRECISION": "fp32",
        "FOLDCP_REPORT": str(work / "foldcp.json"), "OMP_NUM_THREADS": str(threads),
    }  # fmt: skip
    command = [str(Path(sys.executable).with_name("boltz")), "predict", *arguments]
    return _run("foldcp", work, command, variables)


def _run(name: str, work: Path, command: Sequence[str], variables: Mapping[str, str]) -> Run:
    out, log, report = work / name, work / f"{name}.log", work / f"{name}.json"
    shutil.rmtree(out, ignore_errors=True)
    report.unlink(missing_ok=True)
    work.mkdir(exist_ok=True)
    env = {key: value for key, value in os.environ.items() if not key.startswith("FOLDCP")}
    start = time.perf_counter()
    with log.open("wb") as stream:
        code = subprocess.call([*command, "--out_dir", str(out)], env={**env, **variables},
                               cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT)  # fmt: skip
    seconds = time.perf_counter() - start
    if code != 0:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise RuntimeError(f"the {name} run ended with code {code}; the end of {log}:\n{end}")
    if not report.exists():
        raise RuntimeError("FOLDCP=1 changed nothing, so the second run was stock Boltz too; "
                           "install foldcp into this environment: make setup")  # fmt: skip
    numbers = json.loads(report.read_text())
    stem = Path(command[command.index("predict") + 1]).stem
    return Run(
        prediction=out / f"boltz_results_{stem}" / "predictions" / stem,
        seconds=seconds,
        peak_bytes=max(numbers["peak_rss_bytes"]),
        sent_bytes=max(numbers.get("sent_bytes") or [0]),
    )
