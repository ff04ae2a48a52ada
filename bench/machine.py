"""What a measurement was made on: machine, commit and versions, as columns of a table."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
# Written by bench/gpu/carry.sh: on a machine that has a copy of the tree there is no git history.
SOURCES = ("foldcp", "foldcp_kernels", "csrc", "setup.py")  # as in carry.sh
CARRIED_COMMIT = ROOT / ".gpu-deps" / "COMMIT"


@lru_cache
def describe() -> dict[str, str]:
    """Columns that every table of `bench/results` carries.

    Returns:
        `machine` (processor and number of cores), `commit` ("+" when files differ from it),
        `python`, `torch`, `boltz`; with a GPU also `gpu`, `driver`, `triton` and
        `cuequivariance-torch`.
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


def _commit() -> str:
    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    if not (ROOT / ".git").exists():
        return CARRIED_COMMIT.read_text().strip() if CARRIED_COMMIT.is_file() else "none"
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *SOURCES)
    return (git("rev-parse", "--short", "HEAD") or "none") + ("+" if changed else "")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a table, with the columns of `describe` at the end of every row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [row | describe() for row in rows]
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def own_folder() -> Path:
    """Where `foldcp bench` writes unless it is told where: never among the results of the clone."""
    return Path("foldcp_bench")


def results_folder() -> Path:
    """The tracked tables of such a machine: `bench/results/cpu` or `.../gpu-h100-80gb-hbm3`."""
    if not torch.cuda.is_available():
        return ROOT / "bench" / "results" / "cpu"
    words = torch.cuda.get_device_name().lower().split()
    return ROOT / "bench" / "results" / "-".join(["gpu", *(w for w in words if w != "nvidia")])
