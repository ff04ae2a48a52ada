"""What the CUDA kernels of csrc/wire/pack.cu compile to on every chip; needs nvcc, no GPU.

    python -m bench.native [--chips 80,90a] [--out CSV]

A kernel passes when it has no stack frame and no spills, and few enough registers for six blocks of
256 threads on a multiprocessor: packing is bound by memory and lives on threads in flight.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.machine import ROOT, write_csv

CHIPS = ("80", "90a", "100a", "120")
MOST_REGISTERS = 40  # 65536 / (6 * 256), in steps of 8
RESULT = ROOT / "bench/results/native.csv"
_CSRC = ROOT / "csrc"
_SOURCE = _CSRC / "wire/pack.cu"
_KERNEL = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>.*?)$",
    re.S | re.M,
)


def find_nvcc() -> str | None:
    """Path of nvcc, None where there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")


def compile_for(chip: str, source: Path = _SOURCE) -> list[dict[str, Any]]:
    """Compile the kernels for a chip.

    Args:
        chip: such as "90a".
        source: a CUDA file.

    Returns:
        A row per kernel: `kernel`, `chip`, `registers`; `shared`, `stack` and `spills` in bytes.

    Raises:
        RuntimeError: it does not compile.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [find_nvcc() or "nvcc", "-std=c++20", "-O3", "-cubin", f"-arch=sm_{chip}"]
        command += [f"-I{_CSRC}", "-Xptxas", "-v", "-o", f"{folder}/kernels.cubin", str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return read_report(done.stderr, chip)


def read_report(text: str, chip: str) -> list[dict[str, Any]]:
    """The rows of what `ptxas -v` printed."""
    rows = []
    for found in _KERNEL.finditer(text):
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        row = {"kernel": _short(found["kernel"]), "chip": f"sm_{chip}"}
        row |= {"registers": int(found["registers"]), "shared": int(shared[1]) if shared else 0}
        row |= {"stack": int(found["stack"])}
        rows.append(row | {"spills": int(found["stores"]) + int(found["loads"])})
    return sorted(rows, key=lambda r: r["kernel"])


def problems(row: dict[str, Any]) -> list[str]:
    """Why a kernel does not pass."""
    wrong = [f"{row[x]} bytes of {x}" for x in ("stack", "spills") if row[x]]
    if row["registers"] > MOST_REGISTERS:
        wrong.append(f"{row['registers']} registers")
    return wrong


def _short(symbol: str) -> str:
    plain = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    name = re.search(r"(\w+(?:<[^(]*>)?)\(foldcp::", plain)
    return name[1].replace("unsigned ", "u") if name else plain.strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table; 1 when a kernel does not pass."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", default=",".join(CHIPS))
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    rows = [row for chip in options.chips.split(",") for row in compile_for(chip)]
    write_csv(options.out, [row | {"problems": "; ".join(problems(row))} for row in rows])
    bad = [row for row in rows if problems(row)]
    for row in bad:
        print(f"{row['kernel']} {row['chip']}: {'; '.join(problems(row))}")
    print(f"{len(rows)} kernels, {len(bad)} with problems; {options.out}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
