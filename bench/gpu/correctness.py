"""Is what the kernels compute right on this GPU? The cases of bench/gpu/cases.py, in parallel.

    python -m bench.gpu.correctness [--within 80] [--out FOLDER]
    python -m bench.gpu.correctness --fast   # a rehearsal: a few cases in Triton's interpreter

Cases are given out, the most valuable first, to processes that share the GPU and Triton's cache on
disk: nearly all of the time is compiling. A case that hangs is stopped after `CASE_LIMIT` seconds,
with a trace of where it was, and costs only itself; after one that is not right its process is
replaced, as an error may have spoilt the GPU's context. Writes correctness.csv after every case.

Compiling takes 79 s of one core for 157 kernels of 143 cases (bench/results/compile.csv: sm_90,
Triton 3.6.0, `python -m bench.gpu.compile_time`), so about 40 s with 12 processes when compiling
takes twice that and a case a second of its own; a test compares this with the limit in run.sh:

    cases                      kernels  seconds of a core
    22 op boltz 256                 28     13.1
     3 graph                         0      0.0
    22 op boltz 131                 26     13.7
    22 op bf16 256                  27     12.4
     4 gradient bf16 131            10      6.2
    22 op bf16 131                  20     11.1
    22 op fp32 131                  21      9.6
    22 op fp32 256                  22     11.0
     4 gradient fp32 256             3      1.7
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from bench.gpu.cases import FAST, GROUPS, Case, LeftOut, check
from bench.machine import ROOT, results_folder, write_csv

CASE_LIMIT, START_LIMIT = 30.0, 45.0
GRACE = 5.0  # beyond --within, for cases under way
MOST_WORKERS = 12
GROUPS_OF = {False: GROUPS, True: FAST}
COLUMNS = ("case", "status", "error", "bound", "seconds", "reason")


def cases(fast: bool) -> list[Case]:
    """All cases, in the order in which they are given out."""
    return [case for group in GROUPS_OF[fast] for case in group.cases()]


def workers() -> int:
    """As many processes as compile at once without taking turns."""
    return max(1, min(MOST_WORKERS, (os.cpu_count() or 1) - 2))


def serve() -> None:
    """Read names of cases from standard input and write a row for each: a worker's whole life."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a compiler prints must not get between the rows
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = {case.name: case for fast in GROUPS_OF for case in cases(fast)}
    if device.type == "cuda":
        torch.zeros(1, device=device)
    print("ready", file=answer, flush=True)
    for line in sys.stdin:
        try:
            row = check(known[line.strip()], device)
        except LeftOut as error:
            row = {"status": "left out", "reason": str(error)}
        except Exception as error:  # a case must not end the others
            row = {"status": "failed", "reason": _first(error)}
        print(json.dumps(row), file=answer, flush=True)


def _first(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"[:300]


class Worker:
    """A process that checks cases, and is replaced when one goes wrong."""

    def __init__(self, command: list[str]) -> None:
        self._command, self._process = command, None
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115

    def run(self, case: Case, limit_s: float) -> dict[str, Any]:
        """The row of one case, which may take so many seconds."""
        if self._process is None:
            self._log.seek(0)
            self._log.truncate()
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, env=os.environ | {"PYTHONFAULTHANDLER": "1"}, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            )  # fmt: skip
            if self._line(START_LIMIT) is None:
                return self._lost("the process that checks did not start", START_LIMIT)
        print(case.name, file=self._process.stdin, flush=True)
        line = self._line(limit_s)
        if line is None:
            return self._lost("no answer", limit_s)
        row = json.loads(line)
        if row["status"] not in ("ok", "left out"):
            self.stop()
        return row

    def _line(self, limit_s: float) -> str | None:
        """The next line; None when the process ends or the time is up."""
        if not select.select([self._process.stdout], [], [], limit_s)[0]:
            return None
        return self._process.stdout.readline() or None

    def _lost(self, what: str, limit_s: float) -> dict[str, Any]:
        """End the process, and say what is known of why it did not answer."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(0.5)  # its output may end a moment before it does
        late = self._process.poll() is None
        self.stop(signal.SIGABRT if late else None)
        self._log.seek(0)
        lines = [x.rstrip() for x in self._log if x.strip()]
        print("\n".join(lines[-20:]), flush=True)
        last = f"after {limit_s:.0f} s" if late else f"exit {self._process_code}"
        where = next((x.strip() for x in lines if x.lstrip().startswith("File ")), "")
        said = where if late else (lines[-1] if lines else "")
        reason = f"{what} ({last}) {said}".strip()
        return {"status": "timeout" if late else "failed", "reason": reason[:300]}

    def stop(self, sign: int | None = signal.SIGKILL) -> None:
        """End the process; SIGABRT lets Python say where it was."""
        if self._process is None:
            return
        if sign is not None:
            self._process.send_signal(sign)
        try:
            self._process.wait(3)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process_code = self._process.returncode
        self._process.stdin.close()
        self._process.stdout.close()
        self._process = None


class Session:
    """All cases, their rows, and when to stop."""

    def __init__(self, todo: list[Case], within_s: float, out: Path) -> None:
        self._todo: queue.SimpleQueue[Case] = queue.SimpleQueue()
        for case in todo:
            self._todo.put(case)
        self._end, self._out = time.monotonic() + within_s if within_s else 0.0, out
        self._lock = threading.Lock()
        self.rows: dict[str, dict[str, Any]] = {}

    def work(self, command: list[str]) -> None:
        """Give cases to one worker until none is left, or no time."""
        worker = Worker(command)
        try:
            while True:
                case = self._todo.get_nowait()
                if self._end and time.monotonic() > self._end:
                    self._keep(case, {"status": "skipped", "reason": "no time left"}, 0.0)
                    continue
                start = time.monotonic()
                left = self._end + GRACE - start if self._end else CASE_LIMIT
                row = worker.run(case, min(CASE_LIMIT, left))
                self._keep(case, row, time.monotonic() - start)
        except queue.Empty:
            pass
        finally:
            worker.stop()

    def _keep(self, case: Case, row: dict[str, Any], seconds: float) -> None:
        full = {"case": case.name, "error": "", "bound": "", "reason": ""} | row
        full |= {k: f"{full[k]:.2e}" for k in ("error", "bound") if full[k] != ""}
        full["seconds"] = round(seconds, 2)
        with self._lock:
            self.rows[case.name] = {k: full[k] for k in COLUMNS}
            write_csv(self._out, list(self.rows.values()))
            said = full["reason"] or f"error {full['error'] or 0} of {full['bound'] or 0}"
            print(f"{full['status']:8} {seconds:5.1f} s  {case.name}: {said}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Check all cases; 1 when one is not right."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.correctness")
    parser.add_argument("--fast", action="store_true", help="few cases, for a CPU")
    parser.add_argument("--within", type=float, default=0, help="give out no case after these s")
    parser.add_argument("--workers", type=int, default=workers())
    parser.add_argument("--out", type=Path, default=results_folder())
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.serve:
        serve()
        return 0
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # the processes inherit it
    start, todo = time.monotonic(), cases(options.fast)
    session = Session(todo, options.within, options.out / "correctness.csv")
    command = [sys.executable, "-m", "bench.gpu.correctness", "--serve"]
    threads = [
        threading.Thread(target=session.work, args=(command,))
        for _ in range(min(options.workers, len(todo)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found: dict[str, list[str]] = {}
    for row in session.rows.values():
        found.setdefault(row["status"], []).append(row["case"])
    bad = {k: v for k, v in found.items() if k not in ("ok", "skipped", "left out")}
    for status, names in bad.items():
        print(f"{status.upper()}: {', '.join(names)}")
    counts = ", ".join(f"{len(v)} {k}" for k, v in sorted(found.items()))
    print(f"{len(todo)} cases in {time.monotonic() - start:.0f} s: {counts}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
