"""Which candidate of a kernel is used on a chip until one is measured: a model of what overlaps.

Registers and shared memory (bench/results/aot.csv) say how many programs a multiprocessor holds.
One program reads, computes and writes one after the other; only its loop overlaps reading the next
weights or keys with math. Others on the same multiprocessor fill the gaps:

    clocks of a program = max(each resource alone, (reads + loop + writes + latencies) / programs)

Resources are a multiprocessor's share of device memory, L2, tensor cores and special functions. The
multiprocessors run in step, as they start, so that reads get no more than their share. L2 counts
because smaller blocks read weights, keys and bias more often. A model, not a measurement.

    python -m bench.occupancy        # markdown: what was chosen and why
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bench import roofline
from bench.machine import ROOT
from foldcp_kernels.core.triton_configs import Config, candidates

AOT = ROOT / "bench/results/aot.csv"
KERNELS = ("attention_32", "attention_output", "multiplication_output", "transition")
CHIPS = {"sm_80": "A100", "sm_89": "4090", "sm_90": "H100", "sm_100": "B200", "sm_120": "5090"}
# Per multiprocessor: KiB of shared memory, threads, programs (CUDA programming guide, compute
# capabilities 8.0, 8.9, 9.0, 10.0, 12.0); 64 Ki registers on all, given to warps by 256.
SHARED_KIB = {"sm_80": 164, "sm_89": 100, "sm_90": 228, "sm_100": 228, "sm_120": 100}
THREADS = {"sm_80": 2048, "sm_89": 1536, "sm_90": 2048, "sm_100": 2048, "sm_120": 1536}
MOST = {"sm_80": 32, "sm_89": 24, "sm_90": 32, "sm_100": 32, "sm_120": 24}
REGISTERS, OWN_KIB = 65536, 1  # 1 KiB of shared memory of each program is the system's
L2_BYTES = 32  # a clock and multiprocessor: half of what its port takes; an assumption
LATENCY = 800  # clocks of a read of device memory under load; an assumption
N = 1024  # of the pair tensor that is modelled, float32 under autocast
GAIN = 0.03  # a candidate that is not this much faster than the one listed before it is not better


def programs(chip: str, registers: int, shared_kib: float, warps: int) -> int:
    """How many programs a multiprocessor holds at once.

    Args:
        chip: as in `CHIPS`.
        registers: of a thread.
        shared_kib: of a program.
        warps: of a program.
    """
    of_warp = -(-registers * 32 // 256) * 256
    return min(
        REGISTERS // (of_warp * warps),
        int(SHARED_KIB[chip] // (shared_kib + OWN_KIB)),
        THREADS[chip] // (32 * warps),
        MOST[chip],
    )


@dataclass(frozen=True)
class Program:
    """Work of one program: bytes, operations and special functions; `positions` it makes."""

    positions: int
    read: float
    written: float
    l2: float
    flops: float
    special: float


def work(kernel: str, blocks: dict[str, int]) -> Program:
    """What one program does for pairs of 128 channels in float32, operands in bf16; N = 1024."""
    c, e, f = 128, 2, 4
    if kernel == "attention_32":
        rows, bi, d = blocks["ROWS"], blocks["BI"], 32
        logits = rows * bi * N
        # Keys and values of each row and one bias; queries come once and results go once.
        l2 = (2 * rows * N * d + bi * N) * e
        side = rows * bi * d * e
        return Program(rows * bi, side, side, l2, 4 * logits * d, logits)
    p = blocks["BP"]
    x = p * c * f  # read once for its norm and again, from L2, to be added to
    if kernel == "transition":
        return Program(p, x, x, 3 * c * 4 * c * e + x, 2 * p * c * 4 * c * 3, 2 * p * 4 * c)
    # The other input is in bf16; a sigmoid is an exponential and a reciprocal.
    return Program(p, x + p * c * e, x, 2 * c * c * e + x, 2 * p * c * c * 2, 2 * p * c)


def clocks(kernel: str, config: Config, chip: str, at_once: int) -> float:
    """Clocks that a multiprocessor takes for one position.

    Args:
        kernel: as in `KERNELS`.
        config: its configuration.
        chip: as in `CHIPS`.
        at_once: programs that a multiprocessor holds.
    """
    gpu, w = next(c for c in roofline.CHIPS if c.name == CHIPS[chip]), work(kernel, config.blocks)
    hz = gpu.sms * gpu.clock_ghz * 1e9
    memory = gpu.tbs * 1e12 / hz
    read, written = w.read / memory, w.written / memory
    parts = (
        w.l2 / L2_BYTES, w.flops / (gpu.tensor_rate(2) / hz), w.special / roofline.EXP_PER_CLOCK
    )  # fmt: skip
    loop = max(parts) if config.stages > 1 else sum(parts)
    alone = read + loop + written + 2 * LATENCY
    return max(read + written, *parts, alone / at_once) / w.positions


@dataclass(frozen=True)
class Choice:
    """One candidate: programs on a multiprocessor, modelled us of an N = 1024 pair tensor."""

    config: Config
    at_once: int
    us: float


def choices(kernel: str, chip: str, rows: Iterable[dict[str, Any]]) -> list[Choice]:
    """All candidates of a kernel as modelled, in the order of the table.

    Args:
        kernel: as in `KERNELS`.
        chip: as in `CHIPS`.
        rows: of bench/results/aot.csv.

    Raises:
        ValueError: a candidate was not compiled, or one does not pass the gate.
    """
    rows = [r for r in rows if r["chip"] == chip and r["operands"] == "bf16"]
    found = []
    for config in candidates(kernel, 2, chip):
        ends = ", ".join(f"{k}={v}" for k, v in config.options().items())
        name = re.sub(r"_\d+$", "", kernel) + "_kernel"
        width = "D=32, " if kernel == "attention_32" else "C=128, "
        mine = [
            r for r in rows
            if r["kernel"] == name and r["constants"].endswith(ends) and width in r["constants"]
        ]  # fmt: skip
        if not mine or any(r["problems"] for r in mine):
            said = "; ".join(r["problems"] for r in mine) or "not compiled: run python -m bench.aot"
            raise ValueError(f"`{kernel}` on {chip}, {ends}: {said}")
        # The one with the most registers decides: all variants of a kernel run in one predict.
        at_once = min(
            programs(chip, int(r["registers"]), float(r["shared_kib"]), int(r["warps"]))
            for r in mine
        )
        gpu = next(c for c in roofline.CHIPS if c.name == CHIPS[chip])
        positions = N * N * (4 if kernel == "attention_32" else 1)  # of each head
        us = clocks(kernel, config, chip, at_once) * positions / gpu.sms / gpu.clock_ghz / 1e3
        found.append(Choice(config, at_once, us))
    return found


def best(found: list[Choice]) -> Choice:
    """The fastest as modelled; of equals the one with the larger blocks, which reads L2 less."""
    ordered = sorted(found, key=lambda c: -max(c.config.blocks.get(b, 0) for b in ("BP", "BI")))
    chosen = ordered[0]
    for choice in ordered[1:]:
        if choice.us < (1 - GAIN) * chosen.us:
            chosen = choice
    return chosen


def table() -> str:
    """Markdown: per kernel and chip the candidates, the one in use in bold."""
    with AOT.open() as file:
        rows = list(csv.DictReader(file))
    lines = ["| kernel | " + " | ".join(CHIPS) + " |", "|" + "---|" * (1 + len(CHIPS))]
    for kernel in KERNELS:
        cells = []
        for chip in CHIPS:
            found = choices(kernel, chip, rows)
            chosen = best(found)
            said = [
                f"{'**' if c is chosen else ''}{c.config.warps} warps x {c.at_once}: {c.us:.0f}"
                f"{'**' if c is chosen else ''}"
                for c in found
            ]
            cells.append(", ".join(said))
        lines.append(f"| {kernel} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
