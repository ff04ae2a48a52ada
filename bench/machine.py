"""What a measurement was made on: machine, commit and versions, as columns of a table."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


@lru_cache
def describe() -> dict[str, str]:
    """Columns that every table of `bench/results` carries.

    Returns:
        `machine` (processor and number of cores), `commit` ("+" when files differ from it),
        `python`, `torch`, `boltz`.
    """
    return {
        "machine": f"{_processor()} x{os.cpu_count()}",
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "boltz": version("boltz"),
    }


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

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "foldcp", "foldcp_kernels")
    return (git("rev-parse", "--short", "HEAD") or "none") + ("+" if changed else "")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a table, with the columns of `describe` at the end of every row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [row | describe() for row in rows]
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
