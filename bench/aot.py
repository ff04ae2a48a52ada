"""Compile every kernel at its shipped configuration for every chip, without a GPU, and inspect it.

    python -m bench.aot [--chips 90,100] [--only contraction] [--out CSV] [--table]

What is compiled is what the launchers launch: ops run on "meta" tensors in Boltz-2's shapes. A
kernel passes when nothing spills, its shared memory fits the chip, its dots run on the tensor-core
instruction of the chip, and asked-for warp specialisation really added warps. For attention the
table also says how many issue slots its loop takes per slot of its exponentials (bench/sass.py).
All candidates of a kernel are compiled; bench.occupancy says which is in use and why.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from bench.aot_cases import MODES, Meta, attention, autocast, contraction, heads, ops
from bench.machine import ROOT, write_csv
from bench.sass import issue_ratio

CHIPS = (80, 89, 90, 100, 120)
SHARED_KIB = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
TENSOR_CORE = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
FP8_TENSOR_CORE = {89: "QMMA", 90: "QGMMA", 100: "UTCQMMA", 120: "QMMA"}
INSTRUCTIONS = ("QGMMA", "UTCQMMA", "QMMA", "HGMMA", "UTCHMMA", "HMMA")
SIZES = (1003, 1024)  # one that no block or vector divides, one that all do
RESULT = ROOT / "bench/results/aot.csv"
_NO_DOT = ("adaptive_norm", "gated_residual", "relative_position", "rearranged")
FP8 = "f8E4M3FN"
_SIXTEEN = ("bf16", "f16", "bf16+f16")
_SMALL = ("window",)  # blocks of 32 queries: below the 64 rows of the larger instructions


def inspect(compiled: Any, chip: int) -> dict[str, Any]:
    """Registers, shared memory, spills and tensor-core instruction of one compiled kernel."""
    import triton

    kernel = compiled.kernel
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tools / tool, flag, file.name], capture_output=True, text=True).stdout
            for tool, flag in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    used = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass)) + used["STACK"] + used["LOCAL"]
    found = [x for x in INSTRUCTIONS if re.search(rf"\b{x}\b", sass)]
    ratio = issue_ratio(sass) if compiled.name == "attention_kernel" else None
    dots = re.findall(r"tt\.dot .*?: tensor<[\dx]+x(\w+)>", kernel.asm["ttir"])
    return {
        "kernel": compiled.name,
        "operands": "+".join(sorted(set(dots))) or "none",
        "chip": f"sm_{chip}",
        "constants": compiled.options,
        "registers": used["REG"],
        "shared_kib": round(kernel.metadata.shared / 1024, 1),
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
        "spills": spills,
        "tensor_core": found[0] if found else "none",
        "issue_ratio": "" if ratio is None else round(ratio, 3),
        "triton": triton.__version__,
    }


def problems(row: dict[str, Any], small: bool, specialised: bool) -> list[str]:
    """What is wrong with a compiled kernel; empty when nothing is.

    Args:
        row: from `inspect`.
        small: its blocks are below what the larger instructions take.
        specialised: it asks for warp specialisation.
    """
    chip, wrong = int(row["chip"][3:]), []
    if row["spills"]:
        wrong.append(f"spills ({row['spills']} bytes and instructions)")
    if row["shared_kib"] > SHARED_KIB[chip]:
        wrong.append(f"{row['shared_kib']} KiB of shared memory, the chip has {SHARED_KIB[chip]}")
    if (row["operands"] == "none") != row["kernel"].startswith(_NO_DOT):
        wrong.append(f"dots of {row['operands']}")
    elif row["operands"] != "none" and row["tensor_core"] == "none":
        wrong.append("no tensor-core instruction")
    else:
        cores = FP8_TENSOR_CORE if row["operands"] == FP8 else TENSOR_CORE
        large = row["operands"] == FP8 or row["operands"] in _SIXTEEN and not small
        if large and row["tensor_core"] != cores[chip]:
            wrong.append(f"{row['tensor_core']} instead of {cores[chip]}")
    asked = re.search(r"num_warps=(\d+)", row["constants"])
    if specialised and asked and row["warps"] <= int(asked[1]):
        wrong.append("warp specialisation was asked for and ignored")
    return wrong


_ALL = (ops, attention, heads)
FULL = [("bf16", n, _ALL) for n in SIZES]
FULL += [(mode, SIZES[0], _ALL) for mode in ("bf16 autocast", "fp16", "fp32")]
FULL += [("bf16 autocast", n, (contraction,)) for n in SIZES]
# What Boltz runs: pair tensors in float32 under autocast, attention in bf16 (pair) and float32.
QUICK = [("bf16 autocast", SIZES[0], (*_ALL, contraction)), ("bf16", SIZES[0], (attention,))]


# kernel -> who launches it: what its other candidates (configs.TABLE) are compiled for.
LAUNCHED_BY: dict[str, tuple[Any, tuple[str, ...]]] = {
    "attention_32": (attention, ("panels", "lines")),
    "attention_output": (attention, ("triangle attention True False",)),
    "multiplication_output": (ops, ("triangle_multiplication",)),
    "transition": (ops, ("transition_pair", "transition_msa")),
}
# Of the candidates, --quick compiles those of one chip: the others are in the published table.
QUICK_CANDIDATES = 90


def measure(chip: int, quick: bool = False, only: str = "") -> list[dict[str, Any]]:
    """Compile and inspect everything, or what Boltz runs, or one group of cases, for one chip."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for mode, n, listed in QUICK if quick else FULL:
        groups = [g for g in listed if g is not contraction or chip in FP8_TENSOR_CORE]
        groups = [g for g in groups if only in ("", g.__name__)]
        with _drawing(mode) as draw:
            for name, call in (case for group in groups for case in group(draw, n)):
                _compile(rows, call, chip, mode, n, name)
    if not only and (not quick or chip == QUICK_CANDIDATES):
        for mode, n, groups in QUICK if quick else (*FULL[: len(SIZES)], *QUICK[:1]):
            with _drawing(mode) as draw:
                _compile_candidates(rows, draw, chip, mode, n, groups)
    return list(rows.values())


@contextmanager
def _drawing(mode: str) -> Iterator[Meta]:
    dtype, cast = MODES[mode]
    with torch.no_grad(), autocast(cast):
        yield Meta(dtype)


def _compile(
    rows: dict[tuple[Any, ...], dict[str, Any]],
    call: Callable[[], Any],
    chip: int,
    mode: str,
    n: int,
    name: str,
    only: str = "",
) -> None:
    """Add what a case launches; `only`: the options that mark a candidate."""
    from foldcp_kernels.core.triton_launch import compile_for

    with compile_for(chip) as found:
        call()
    assert found, f"{name} launched nothing"
    for compiled in found:
        key = (compiled.name, compiled.options, compiled.kernel.hash)
        if key not in rows and compiled.options.endswith(only):
            row = _row(compiled, chip, mode, n, name)
            rows[key] = row | {"candidate": "yes" if only else ""}


def _compile_candidates(
    rows: dict[tuple[Any, ...], dict[str, Any]],
    draw: Meta,
    chip: int,
    mode: str,
    n: int,
    groups: Sequence[Any],
) -> None:
    from foldcp_kernels.core import triton_configs as configs

    for kernel, (group, names) in LAUNCHED_BY.items():
        for config in configs.candidates(kernel, 2, f"sm_{chip}")[1:]:
            only = ", ".join(f"{k}={v}" for k, v in config.options().items())
            configs.override(kernel, 2, chip, config)
            for name, call in group(draw, n) if group in groups else ():
                if name in names:
                    _compile(rows, call, chip, mode, n, name, only)
            configs.override(kernel, 2, chip, None)


def _row(compiled: Any, chip: int, mode: str, n: int, case: str) -> dict[str, Any]:
    row = inspect(compiled, chip)
    blocks = [int(x) for x in re.findall(r"\b(?:BI|BP|BO|BK|BJ)=(\d+)", compiled.options)]
    small = case.startswith(_SMALL) or max(blocks, default=64) < 64
    wrong = problems(row, small, "warp_specialize" in compiled.kernel.asm["ttir"])
    return {"mode": mode, "n": n, **row, "problems": "; ".join(wrong)}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: most registers, shared memory, stages of each kernel on each chip as it ships."""
    chips = [f"sm_{c}" for c in CHIPS]
    lines = ["| kernel | operands | " + " | ".join(chips) + " |", "|" + "---|" * (2 + len(chips))]
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for row in (r for r in rows if not r["candidate"]):
        kind = "16 bit" if row["operands"] in _SIXTEEN else "float32"
        kind = "FP8" if row["operands"] == FP8 else kind
        name = row["kernel"].removesuffix("_kernel")
        group = groups.setdefault((name, "" if row["operands"] == "none" else kind), {})
        group.setdefault(row["chip"], []).append(row)
    for (kernel, kind), by_chip in sorted(groups.items()):
        cells = []
        for chip in chips:
            found = by_chip.get(chip, [])
            most = [max((float(r[x]) for r in found), default=0) for x in _SHOWN]
            cells.append(f"{most[0]:.0f} / {most[1]:g} / {most[2]:.0f}" if found else "")
        lines.append(f"| {kernel} | {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _others(path: Path, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a table of before, without those that new ones replace."""
    names = ("mode", "n", "kernel", "operands", "chip", "constants", "registers", "shared_kib")
    new = {tuple(str(row[x]) for x in names) for row in rows}
    with path.open() as file:
        return [row for row in csv.DictReader(file) if tuple(row[x] for x in names) not in new]


_SHOWN = ("registers", "shared_kib", "stages")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table; 1 when a kernel does not pass."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", default=",".join(map(str, CHIPS)))
    parser.add_argument("--quick", action="store_true", help="only what Boltz runs")
    parser.add_argument(
        "--only",
        default="",
        choices=[group.__name__ for group in (*_ALL, contraction)],
        help="this group of cases; kernels of the table that it does not launch are kept",
    )
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="print the table of a CSV")
    options = parser.parse_args(arguments)
    if options.table:
        with options.out.open() as file:
            print(table(list(csv.DictReader(file))))
        return 0
    if os.environ.pop("TRITON_INTERPRET", None):
        print("TRITON_INTERPRET is set: ignored, kernels are compiled")
    chips = [int(c) for c in options.chips.split(",")]
    # Each chip in a process of its own; the slowest to compile first.
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        each = (options.quick, options.only)
        work = [pool.submit(measure, c, *each) for c in sorted(chips, reverse=True)]
        rows = [row for part in work for row in part.result()]
    rows.sort(key=lambda r: (r["kernel"], r["chip"], r["mode"], r["n"], r["constants"]))
    write_csv(options.out, rows, _others(options.out, rows) if options.only else ())
    bad = [r for r in rows if r["problems"]]
    for r in bad:
        print(f"{r['kernel']} {r['chip']} {r['mode']} ({r['constants']}): {r['problems']}")
    print(f"{len(rows)} kernels for {len(chips)} chips, {len(bad)} with problems; {options.out}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
