"""Memory and time of bringing one N x N matrix of expected errors to disk.

    python -m bench.outputs                # N = 10,000; writes bench/results/cpu/outputs.csv

foldcp takes it in row blocks and packs it in the background; stock has it whole in memory and packs
it before the next sample. Each side runs in a process of its own; its extra memory is how much the
highest resident size exceeds the one before the first row.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.machine import ROOT, results_folder, write_csv
from bench.timing import MIB

SIDES = ("stock", "foldcp")
ROWS = 50  # of a block; a rank of a CPU mesh sends about as many at this size


def blocks(n: int, data: str) -> Iterator[tuple[int, Tensor]]:
    """Rows of a matrix, made as they are asked for.

    Args:
        n: N.
        data: "errors" looks like expected errors to a packer (small ones near the diagonal, large
            ones between domains, noise in the low bits); "steps" packs fast.

    Returns:
        (first row, block [rows, N]) in order.
    """
    column = torch.arange(n, dtype=torch.float32)
    for lo in range(0, n, ROWS):
        row = torch.arange(lo, min(lo + ROWS, n), dtype=torch.float32)[:, None]
        if data == "steps":
            yield lo, (row + column).div(64).floor() % 32
            continue
        far = (row - column).abs().div(100).clamp(max=1) * 12
        apart = (row.div(700).floor() != column.div(700).floor()) * 12.0
        noise = torch.rand((len(row), n), generator=torch.Generator().manual_seed(lo))
        yield lo, 0.3 + far + apart + noise


def worker(side: str, n: int, data: str, folder: Path) -> dict[str, Any]:
    """Bring one matrix to `folder`/pae.npz; returns the measured columns."""
    from foldcp.output.spool import Background, Spool

    if side == "foldcp":  # everything is imported and started before the count
        (folder / "warm").mkdir()
        warm = Spool(folder / "warm", Background(1), threading.Event())
        warm.rows("pae", 0, 0, torch.zeros((8, 8)))
        warm.packed(("pae", 0)).unlink()
    before, start, making = _memory("VmRSS"), time.perf_counter(), 0.0
    spool = Spool(folder, Background(1), threading.Event())
    whole = np.empty((n, n), np.float32) if side == "stock" else None
    tick = time.perf_counter()
    for lo, block in blocks(n, data):
        making += time.perf_counter() - tick
        if whole is None:
            spool.rows("pae", 0, lo, block)
        else:
            whole[lo : lo + len(block)] = block.numpy()
        tick = time.perf_counter()
    if whole is not None:
        np.savez_compressed(folder / "pae.npz", pae=whole)
    held = time.perf_counter() - start - making
    if whole is None:
        spool.packed(("pae", 0)).rename(folder / "pae.npz")
    return {
        "extra_mib": round((_memory("VmHWM") - before) / MIB, 1),
        "held_s": round(held, 3),  # that the next sample has to wait
        "all_s": round(time.perf_counter() - start - making, 3),
        "file_mib": round((folder / "pae.npz").stat().st_size / MIB, 1),
    }


def _memory(name: str) -> int:
    """Resident memory of this process in bytes: VmRSS now, VmHWM at its highest."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status does not tell {name}")


def measure(side: str, n: int, data: str, folder: Path) -> dict[str, Any]:
    """Run `worker` in a new process and return its columns."""
    command = [sys.executable, "-m", "bench.outputs", "--worker", side, str(n), data, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{side} at N = {n} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout)


def main(argv: list[str] | None = None) -> int:
    """Measure both sides and write the table; 1 when their matrices differ."""
    parser = argparse.ArgumentParser(prog="python -m bench.outputs")
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        side, n, data, folder = options.worker
        print(json.dumps(worker(side, int(n), data, Path(folder))))
        return 0
    rows, found = [], {}
    for side in SIDES:
        with tempfile.TemporaryDirectory(prefix="foldcp_") as folder:
            columns = measure(side, options.n, "errors", Path(folder))
            found[side] = np.load(Path(folder) / "pae.npz")["pae"]
        rows.append({"n": options.n, "side": side} | columns)
        print(rows[-1], flush=True)
    if not np.array_equal(*found.values()):
        print("the two matrices differ", file=sys.stderr)
        return 1
    write_csv((options.out or results_folder()) / "outputs.csv", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
