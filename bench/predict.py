"""Whole Boltz-2 predictions with untrained weights of the real dimensions.

Stock in plain torch, stock with cuEquivariance's kernels (both bf16-mixed, as `boltz predict` runs
them on a GPU), and foldcp on a 1x1 mesh: time and peak memory of one `predict_step` (features ready
on the device, nothing written). One protein chain of N tokens with 8 atoms each, without MSA and
templates; the same weights, features and seed. Sides take turns, in an order that rotates.

    python -m bench.predict                                    # the real depth on a GPU
    python -m bench.predict --n 512,1024 --one-process --within 100
    python -m bench.predict --n 64 --blocks 2                   # a CPU

Each side is checked first, on a model of few blocks where rounding hides no wrong term
(bench/predict_sides.py); one that fails gets no time. With `--one-process` all sides share a
process, else each has one of its own. One that runs out of memory says "oom" and goes on; a process
that dies is started again for what is left. The table is written after every run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import torch

from bench.machine import ROOT, own_folder, write_csv
from foldcp.runtime.allocator import grow_segments

SIDES = ("stock", "stock-kernels", "foldcp")
SIZES = {"cuda": "256,512,1024,2048,3605", "cpu": "48"}
# (pairformer blocks, MSA blocks, confidence blocks, recycles, sampling steps): as `boltz predict`
# has them, and what a CPU does in a minute.
DEPTH = {"cuda": (64, 4, 8, 3, 200), "cpu": (2, 1, 1, 0, 2)}
# What a timed run must keep beside its check: the mean distance of its atoms from the origin, to
# this part of stock's. bf16 rounding through 64 untrained blocks moves a sample.
TOLERANCE = {"cuda": 0.05, "cpu": 1e-3}
FAILED, CHECK = "failed", 0  # CHECK: the round that checks
KERNEL_PACKAGE = "cuequivariance_ops_torch"

Run = tuple[int, str, int]  # N, side, round
Row = dict[str, Any]


def schedule(sizes: list[int], sides: list[str], rounds: int) -> list[Run]:
    """All runs in order: the checks, then at each N every side in turn, rotated by one a round."""
    runs = [(sizes[0], side, CHECK) for side in sides]
    for n in sizes:
        for k in range(rounds):
            turn = k % len(sides)
            runs += [(n, side, k + 1) for side in sides[turn:] + sides[:turn]]
    return runs


def run(
    runs: list[Run], arguments: list[str], end: float, keep: Callable[[list[Row]], None]
) -> list[Row]:
    """Do runs in a process, and in another where that one dies; a row for each.

    Args:
        runs: in order.
        arguments: of the command line.
        end: time.time() at which to stop, 0 for no limit.
        keep: is given the rows so far after every run.
    """
    rows: list[Row] = []
    if util.find_spec(KERNEL_PACKAGE) is None:
        missing = f"no package {KERNEL_PACKAGE}"
        rows += [_no_row(r, "unavailable", missing) for r in runs if r[1] == "stock-kernels"]
        runs = [r for r in runs if r[1] != "stock-kernels"]
    left = runs
    while left:
        if end and end <= time.time():
            rows += [_no_row(r, "skipped", "no time left") for r in left]
            break
        command = [sys.executable, "-m", "bench.predict", *arguments, f"--end={end}"]
        command += ["--runs", ",".join(f"{n}:{side}:{k}" for n, side, k in left)]
        found: list[Row] = []

        def take(row: Row, before: list[Row] = rows[:], found: list[Row] = found) -> None:  # noqa: B006
            found.append(row)
            keep(before + found)

        reason = _communicate(command, end, take)
        rows += found
        left = left[len(found) :]
        if left and reason == "timeout":
            rows += [_no_row(r, "skipped", "no time left") for r in left]
            break
        if left:
            rows.append(_no_row(left[0], FAILED, reason))
            n, side, k = left[0]
            # A side that died is not tried again at this N, nor anywhere if that was its check.
            left = [r for r in left[1:] if r[1] != side or (k != CHECK and r[0] != n)]
    keep(rows)
    return rows


def _communicate(command: list[str], end: float, take: Callable[[Row], None]) -> str:
    """Run a command until `end` and pass its rows on; why it ended early, if it did."""
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    grow_segments(env)
    last, late = "", threading.Event()
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:

        def stop() -> None:
            late.set()
            child.kill()

        timer = threading.Timer(max(0.0, end - time.time()), stop) if end else None
        if timer is not None:
            timer.start()
        for line in child.stdout:
            if line.startswith("row "):
                take(json.loads(line[4:]))
            elif line.strip():
                last = line.strip()
                print(last, flush=True)
        if timer is not None:
            timer.cancel()
    if late.is_set():
        return "timeout"
    return last[:300] if last and child.returncode else f"exit {child.returncode}"


def _no_row(run: Run, status: str, reason: str) -> Row:
    return {"n": run[0], "side": run[1], "round": run[2], "status": status, "reason": reason}


def judged(rows: list[Row], tolerance: float) -> list[Row]:
    """One row per N and side, its rounds together; a side that is wrong loses its time."""
    checks = {r["side"]: r for r in rows if r["round"] == CHECK}
    groups: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        if row["round"] != CHECK:
            groups.setdefault((row["n"], row["side"]), []).append(row)
    size = {k: _median(g, "checksum") for k, g in groups.items()}
    ms = {k: _median(g, "seconds") for k, g in groups.items()}
    table = []
    for (n, side), group in sorted(groups.items(), key=lambda x: (x[0][0], SIDES.index(x[0][1]))):
        done = [r for r in group if r["status"] == "ok"]
        # What ended a side beats what its earlier rounds were; a round without time does not.
        ended = [r for r in group if r["status"] not in ("ok", "skipped")] or group
        status, reason = ("ok", "") if done and ended is group else _why(ended[0])
        check = checks.get(side, {})
        if check.get("status", "ok") not in ("ok", "skipped"):
            status, reason = _why(check)
        stock = size.get((n, "stock"))
        off = abs(size[n, side] - stock) / max(stock, 1e-9) if done and stock else None
        if status == "ok" and off is not None and not off <= tolerance:
            status, reason = "wrong", f"coordinates are {off:.1%} off stock's in their mean"
        table.append(
            {"n": n, "side": side, "status": status}
            | _figures(n, side, done if status == "ok" else [], ms)
            | {k: _short(check.get(k)) for k in ("structure", "structure_bound")}
            | {k: _short(check.get(k)) for k in ("plddt", "plddt_bound")}
            | {"off_stock": _short(off), "reason": reason}
        )
    return table


def _why(row: Row) -> tuple[str, str]:
    return row["status"], row.get("reason", "")


def _median(group: list[Row], key: str) -> float | None:
    values = [r[key] for r in group if r["status"] == "ok"]
    return statistics.median(values) if values else None


def _figures(n: int, side: str, done: list[Row], ms: dict[tuple[int, str], float | None]) -> Row:
    names = ("seconds", "fastest", "slowest", "runs", "peak_mib")
    row: Row = dict.fromkeys((*names, "speedup_over_stock", "speedup_over_stock_kernels"), "")
    if not done:
        return row
    times = [r["seconds"] for r in done]
    values = (ms[n, side], min(times), max(times))
    row |= {k: round(x, 3) for k, x in zip(names, values, strict=False)} | {"runs": len(times)}
    if "peak_mib" in done[0]:
        row["peak_mib"] = round(max(r["peak_mib"] for r in done), 1)
    for other in ("stock", "stock-kernels"):
        if ms.get((n, other)):
            key = f"speedup_over_{other.replace('-', '_')}"
            row[key] = round(ms[n, other] / ms[n, side], 3)
    return row


def _short(x: float | None) -> str:
    return "" if x is None else f"{x:.2e}"


def _parser(kind: str) -> argparse.ArgumentParser:
    blocks, msa, confidence, recycles, steps = DEPTH[kind]
    parser = argparse.ArgumentParser(prog="python -m bench.predict")
    parser.add_argument("--n", default=SIZES[kind])
    parser.add_argument("--sides", default=",".join(SIDES), help=", ".join(SIDES))
    parser.add_argument("--blocks", type=int, default=blocks)
    parser.add_argument("--msa-blocks", type=int, default=msa)
    parser.add_argument("--confidence-blocks", type=int, default=confidence)
    parser.add_argument("--recycles", type=int, default=recycles)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3 if kind == "cuda" else 1)
    parser.add_argument("--warm-up", action=argparse.BooleanOptionalAction, default=kind == "cuda")
    parser.add_argument("--within", type=float, default=0, help="seconds for all sides together")
    parser.add_argument("--out", type=Path, default=own_folder() / "predict.csv")
    parser.add_argument("--one-process", action="store_true", help="one process for all sides")
    parser.add_argument("--runs", help=argparse.SUPPRESS)  # of the process that this one starts
    parser.add_argument("--end", type=float, default=0, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the sides and write the table; 1 when foldcp is wrong or fails."""
    start, kind = time.time(), "cuda" if torch.cuda.is_available() else "cpu"
    options = _parser(kind).parse_args(argv)
    try:
        import boltz.main  # noqa: F401
    except ImportError as error:
        print(f"left out: no boltz ({error})")
        return 0
    if options.runs:
        from bench.predict_sides import worker

        for row in worker(options, [_parsed(r) for r in options.runs.split(",")]):
            print("row " + json.dumps(row), flush=True)
        return 0
    depth = ("blocks", "msa_blocks", "confidence_blocks", "recycles", "steps", "samples")
    chosen = {name: getattr(options, name) for name in depth}
    arguments = [f"--{k.replace('_', '-')}={v}" for k, v in chosen.items()]
    arguments.append("--warm-up" if options.warm_up else "--no-warm-up")
    # foldcp first: with little time, its figures and stock's are what is wanted.
    sides = sorted(options.sides.split(","), key=("foldcp", "stock", "stock-kernels").index)
    runs = schedule([int(n) for n in options.n.split(",")], sides, options.rounds)
    groups = [runs] if options.one_process else [[r for r in runs if r[1] == x] for x in sides]
    rows: list[Row] = []
    table: list[Row] = []

    def keep(found: list[Row]) -> None:
        table[:] = [row | chosen for row in judged(rows + found, TOLERANCE[kind])]
        if table:
            write_csv(options.out, table)

    for i, group in enumerate(groups):
        share = (options.within - (time.time() - start)) / (len(groups) - i)
        rows += run(group, arguments, time.time() + share if options.within else 0.0, keep)
    keep([])
    for row in table:
        said = f"{row['seconds']} s ({row['runs']} runs), {row['speedup_over_stock']}x stock, "
        said += f"{row['peak_mib'] or '-'} MiB"
        if row["status"] != "ok":
            said = f"{row['status']}: {row['reason']}"
        print(f"N={row['n']} {row['side']:14} {said}")
    print(f"{len(table)} rows in {options.out}")
    return int(any(r["side"] == "foldcp" and r["status"] in ("wrong", FAILED) for r in table))


def _parsed(text: str) -> Run:
    n, side, k = text.split(":")
    return int(n), side, int(k)


if __name__ == "__main__":
    sys.exit(main())
