"""How long the cases of bench/gpu/cases.py take to compile, measured without a GPU.

    python -m bench.gpu.compile_time       # bench/results/compile.csv, about two minutes

Every kernel that a case launches is compiled for sm_90 into an empty cache, and counts for the
first case that needs it: processor seconds of this machine, ptxas included.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench import providers
from bench.gpu.cases import MODES, SEQUENCES, WITHOUT_KERNEL, Case
from bench.gpu.correctness import cases
from bench.machine import ROOT, write_csv
from bench.shapes import OPS, Draw

CHIP = 90
RESULT = ROOT / "bench" / "results" / "compile.csv"


class Shapes(Draw):
    """Draws tensors that have no data."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.device, self.generator = dtype, torch.device("meta"), None
        self.sequences = SEQUENCES

    def normal(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        """An empty tensor."""
        return torch.empty(shape, dtype=self.dtype, device="meta")


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(x) for x in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(x.ru_utime + x.ru_stime for x in used)


def launch(case: Case) -> None:
    """Launch what a case launches; nothing for what has no kernel."""
    from foldcp_kernels.attention import attend

    if case.kind == "graph" or case.what in WITHOUT_KERNEL:
        return
    dtype, low = MODES[case.mode]
    draw = Shapes(dtype)
    if case.what == "relative_position":
        return _relative_position(draw, case.n)
    t = OPS[case.what].make(draw, case.n)
    torch.set_autocast_enabled("cuda", low is not None)
    torch.set_autocast_dtype("cuda", low or torch.bfloat16)
    try:
        with torch.no_grad():
            providers.FOLDCP[case.what](t, "triton")()
        if case.kind == "gradient" and "attention" in case.what:
            # The rest of a backward is torch's.
            q, k, v = (draw.normal(1, case.n, 4, case.n, 32).requires_grad_() for _ in range(3))
            bias = draw.normal(1, 1, 4, case.n, -(-case.n // 16) * 16)[..., : case.n]
            out = attend(q, k, v, bias.requires_grad_(), 0.2, None, "triton")[0]
            torch.autograd.grad(out.sum(), q)
    finally:
        torch.set_autocast_enabled("cuda", False)


def _relative_position(draw: Shapes, n: int) -> None:
    from foldcp_kernels.relative_position.fused import relative_position_fwd

    side = tuple(torch.empty(n, dtype=torch.int32, device="meta") for _ in range(3))
    classes = torch.empty((3, 3), dtype=torch.int32, device="meta")
    table = torch.empty((12 * 131, 128), dtype=draw.dtype, device="meta")
    out = draw.normal(1, n, n, 128)
    relative_position_fwd(out, out, table, side, side, None, classes, 32, 2, False)


def measure() -> Iterator[dict[str, Any]]:
    """A row per case: kernels that no case before it needed, and seconds."""
    from foldcp_kernels.core.triton_launch import compile_for

    seen: set[str] = set()
    for case in cases(fast=False):
        # Whether a mask drops anything cannot be read from tensors without data.
        masked = "masked" in case.what
        whole = mock.patch.object(providers, "_holes", lambda m, keep=masked: m if keep else None)
        before = processor_seconds()
        with whole, compile_for(CHIP) as found:
            launch(case)
        new = {x.kernel.hash for x in found} - seen
        seen |= new
        yield {
            "case": case.name,
            "kernels": len(new),
            "seconds": round(processor_seconds() - before, 2) if new else 0.0,
        }


def main(argv: list[str] | None = None) -> int:
    """Write the table."""
    import triton

    parser = argparse.ArgumentParser(prog="python -m bench.gpu.compile_time")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        rows = [row | {"chip": f"sm_{CHIP}", "triton": triton.__version__} for row in measure()]
    write_csv(options.out, rows)
    kernels, seconds = (sum(r[k] for r in rows) for k in ("kernels", "seconds"))
    print(f"{len(rows)} cases, {kernels} kernels, {seconds:.0f} s of a core; {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
