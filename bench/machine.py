"""Write tables of measurements; each row names the machine, the commit and versions."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
SOURCES = ("foldcp", "foldcp_kernels", "csrc", "setup.py")  # as in carry.sh
# Written by bench/gpu/carry.sh: on a machine that has a copy of the tree there is no git history.
CARRIED_COMMIT = ROOT / ".gpu-deps" / "COMMIT"
# The last columns of every table, after those of its own.
META = ("machine", "commit", "python", "torch", "boltz")
GPU_META = (*META, "gpu", "driver", "triton", "cuequivariance-torch")


@lru_cache
def describe() -> dict[str, str]:
    """Fill the columns that every table ends with: `META`, with a GPU `GPU_META`.

    Returns:
        `machine` (processor and number of cores), `commit` ("+" when files differ from it),
        versions; with a GPU also its name and driver.
    """
    columns = {
        "machine": f"{_processor()} x{os.cpu_count()}",
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "boltz": _version("boltz"),
    }
    if torch.cuda.is_available():
        columns |= {"gpu": torch.cuda.get_device_name(), "driver": _driver()}
        columns |= {x: _version(x) for x in ("triton", "cuequivariance-torch")}
    return columns


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.split("\n")[0].strip() or "unknown"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git(*args: str) -> str:
    done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.rstrip()


def _commit() -> str:
    if not (ROOT / ".git").exists():
        return CARRIED_COMMIT.read_text().strip() if CARRIED_COMMIT.is_file() else "none"
    return (_git("rev-parse", "--short", "HEAD") or "none") + ("+" if differing() else "")


def differing() -> list[str]:
    """List the files of `SOURCES` that differ from the commit, new ones included."""
    if not (ROOT / ".git").exists():
        return ["files that were carried here"] if _commit().endswith("+") else []
    return [line[3:] for line in _git("status", "--porcelain", "--", *SOURCES).splitlines()]


def write_csv(path: Path, rows: list[dict[str, Any]], kept: Sequence[dict[str, Any]] = ()) -> None:
    """Write a table, its own columns first, then those of `describe`.

    Args:
        path: of the table. Those below `bench/results` are evidence of a commit.
        rows: one dictionary a row, with the same keys in each.
        kept: rows of before, written as they are after the others.

    Raises:
        SystemExit: the table belongs below `bench/results`, and files differ from the commit. It
            is left in `own_folder`, marked with a "+".
    """
    tracked, files = (ROOT / "bench" / "results").resolve(), differing()
    if not files or tracked not in path.resolve().parents:
        return _write(path, rows, kept)
    marked = own_folder() / path.resolve().relative_to(tracked)
    _write(marked, rows, kept)
    raise SystemExit(
        f"{path} is not written: {', '.join(files[:5])}{' and more' if len(files) > 5 else ''} "
        f"differ from the commit that the table would name. Commit first, or pass another --out. "
        f'This table is in {marked}, marked "+".'
    )


def _write(path: Path, rows: list[dict[str, Any]], kept: Sequence[dict[str, Any]] = ()) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = describe()
    own = [name for name in rows[0] if name not in meta]
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, [*own, *meta])
        table.writeheader()
        table.writerows(row | meta for row in rows)
        table.writerows(kept)


def own_folder() -> Path:
    """Return the folder that `foldcp bench` writes to by default, outside `bench/results`."""
    return Path("foldcp_bench")


def results_folder() -> Path:
    """Return the folder of such a machine: `bench/results/cpu` or `.../gpu-h100-80gb-hbm3`."""
    if not torch.cuda.is_available():
        return ROOT / "bench" / "results" / "cpu"
    words = torch.cuda.get_device_name().lower().split()
    return ROOT / "bench" / "results" / "-".join(["gpu", *(w for w in words if w != "nvidia")])
