"""Compile every kernel at its shipped configuration for every chip, without a GPU, and inspect it.

    python -m bench.aot [--chips 90,100] [--out CSV] [--table]

What is compiled is what the launchers launch: ops run on "meta" tensors in Boltz-2's shapes. A
kernel passes when nothing spills, its shared memory fits the chip, its dots run on the tensor-core
instruction of the chip, and asked-for warp specialisation really added warps. For attention the
table also says how many issue slots its loop takes per slot of its exponentials (bench/sass.py).
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
from torch import Tensor

from bench import shapes
from bench.machine import ROOT, write_csv
from bench.sass import issue_ratio

CHIPS = (80, 89, 90, 100, 120)
SHARED_KIB = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
TENSOR_CORE = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
SIZES = (1003, 1024)  # one that no block or vector divides, one that all do
RESULT = ROOT / "bench/results/aot.csv"
_NO_DOT = ("adaptive_norm", "gated_residual", "relative_position", "rearranged")
_SIXTEEN = ("bf16", "f16", "bf16+f16")
_SMALL = ("window",)  # blocks of 32 queries: below the 64 rows of the larger instructions


class Meta(shapes.Draw):
    """Shapes without data."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.device = dtype, torch.device("meta")
        self.generator, self.sequences = None, 128

    def normal(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        """An empty tensor."""
        return torch.empty(shape, dtype=self.dtype, device="meta")


def _ops(draw: Meta, n: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, call) of every op in the benchmark's shapes."""
    from bench.providers import FOLDCP

    # Attention and positions come below; the single track is too wide for the fused transition.
    apart = ("relative_position", "transition_single")
    for name, op in shapes.OPS.items():
        if "attention" not in name and name not in apart:
            inputs = op.make(draw, n)
            yield name, lambda f=FOLDCP[name], t=inputs: f(t, "triton")()


def _attention(draw: Meta, n: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Attention of every shape: masked, carried, per sample, per window, and its gradients."""
    from foldcp_kernels.attention import attend, attend_panel
    from foldcp_kernels.triangle_attention import triangle_attention

    weights = shapes._attention(draw, n)
    from bench.eager import attention_weights

    w = attention_weights(weights)
    for starting in (True, False):
        for mask in (None, weights["mask"]):
            yield (
                f"triangle attention {starting} {mask is not None}",
                lambda m=mask, s=starting: triangle_attention(weights["z"], m, w, s, "triton"),
            )

    def qkv(g0: int, g1: int, h: int, i: int, k: int, d: int, grad: bool = False) -> list[Tensor]:
        lines = (i, k, k)
        found = [draw.normal(g0, g1, x, h, d).transpose(2, 3) for x in lines]
        return [*found, draw.normal(g0, 1, h, i, -(-k // 16) * 16)[..., :k].requires_grad_(grad)]

    def panels() -> None:
        q, k, v, bias = qkv(1, n, 4, n, n, 32)
        first = attend_panel(q, k, v, bias, 0.2, None, False, "triton")
        second = attend_panel(q, k, v, bias, 0.2, first, False, "triton")
        attend_panel(q, k, v, bias, 0.2, second, True, "triton")

    yield "panels", panels
    shapes_of = {
        "lines": (1, n, 4, n, n, 32),
        "heads of 64": (1, n, 2, n, n, 64),
        "trunk": (1, 1, 16, n, n, 24),
        "diffusion": (1, 5, 16, n, n, 48),
        "diffusion, one sample": (1, 1, 16, n, n, 48),
        "windows": (n // 4, 5, 4, 32, 128, 32),
    }
    for name, shape in shapes_of.items():
        keep = torch.empty((shape[0], shape[1], shape[4]), dtype=torch.bool, device="meta")
        for kept in (None, keep):
            yield name, lambda s=shape, k=kept: attend(*qkv(*s), 0.2, k, impl="triton")

    def gradients(shape: tuple[int, ...], keep: Tensor | None) -> None:
        with torch.enable_grad():
            inputs = qkv(*shape, grad=True)
            torch.autograd.grad(attend(*inputs, 0.2, keep, "triton")[0].sum(), inputs[3])

    for shape in ((1, n, 4, n, n, 32), (1, 5, 16, n, n, 48)):
        keep = torch.empty((shape[0], shape[1], shape[4]), dtype=torch.bool, device="meta")
        for kept in (None, keep):
            yield "gradients", lambda s=shape, k=kept: gradients(s, k)


def _heads(draw: Meta, n: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Relative positions, symmetric and separate heads, conditioned layers of tokens and atoms."""
    from foldcp_kernels.fused.adaptive_norm import adaptive_norm_fwd, gated_residual_fwd
    from foldcp_kernels.fused.heads import expected_values_fwd
    from foldcp_kernels.fused.relative_position import relative_position_fwd

    z, dtype = draw.normal(1, n, n, 128), draw.dtype
    side = tuple(torch.empty(n, dtype=torch.int32, device="meta") for _ in range(3))
    period = torch.empty(n, device="meta")
    classes = torch.empty((5, 3), dtype=torch.int32, device="meta")
    table = torch.empty((12 * 131, 128), device="meta")
    for p in (None, period):
        yield (
            "relative position",
            lambda p=p: relative_position_fwd(z, z, table, side, side, p, classes, 32, 2, True),
        )
    values = torch.empty((2, 64), device="meta")
    same = torch.empty((1, n, n), dtype=torch.bool, device="meta")
    w = draw.normal(64, 128)
    yield (
        "separate heads",
        lambda: expected_values_fwd(z, w, values, None, z.transpose(1, 2), w, same),
    )
    for c in (128, 768):
        a, s = draw.normal(5, n, c), draw.normal(1, n, c)
        yield "adaptive norm", lambda a=a, s=s: adaptive_norm_fwd(a, s, s, dtype, True, 1e-5)
        yield "gated residual", lambda a=a, s=s: gated_residual_fwd(a, s, a, True)


@contextmanager
def _autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """CUDA autocast; `torch.autocast` turns itself off where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype is not None)
    torch.set_autocast_dtype("cuda", dtype or before[1])
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


# name -> (dtype of tensors, dtype of products where autocast sets another)
MODES: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "bf16": (torch.bfloat16, None),
    "bf16 autocast": (torch.float32, torch.bfloat16),
    "fp16": (torch.float16, None),
    "fp32": (torch.float32, None),
}


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
    found = [x for x in ("HGMMA", "UTCHMMA", "HMMA") if re.search(rf"\b{x}\b", sass)]
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
        row: from `inspect`. small: its blocks are below what the larger instructions take.
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
    elif row["operands"] in _SIXTEEN and not small and row["tensor_core"] != TENSOR_CORE[chip]:
        wrong.append(f"{row['tensor_core']} instead of {TENSOR_CORE[chip]}")
    asked = re.search(r"num_warps=(\d+)", row["constants"])
    if specialised and asked and row["warps"] <= int(asked[1]):
        wrong.append("warp specialisation was asked for and ignored")
    return wrong


_ALL = (_ops, _attention, _heads)
FULL = [("bf16", n, _ALL) for n in SIZES]
FULL += [(mode, SIZES[0], _ALL) for mode in ("bf16 autocast", "fp16", "fp32")]
# What Boltz runs: pair tensors in float32 under autocast, attention in bf16 (pair) and float32.
QUICK = [("bf16 autocast", SIZES[0], _ALL), ("bf16", SIZES[0], (_attention,))]


def measure(chip: int, quick: bool = False) -> list[dict[str, Any]]:
    """Compile and inspect everything, or what Boltz runs, for one chip."""
    from foldcp_kernels.fused.launch import compile_for

    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for mode, n, groups in QUICK if quick else FULL:
        dtype, cast = MODES[mode]
        draw = Meta(dtype)
        with torch.no_grad(), _autocast(cast):
            for name, call in (case for group in groups for case in group(draw, n)):
                with compile_for(chip) as found:
                    call()
                assert found, f"{name} launched nothing"
                for compiled in found:
                    key = (compiled.name, compiled.options, compiled.kernel.hash)
                    if key not in rows:
                        rows[key] = _row(compiled, chip, mode, n, name)
    return list(rows.values())


def _row(compiled: Any, chip: int, mode: str, n: int, case: str) -> dict[str, Any]:
    row = inspect(compiled, chip)
    blocks = [int(x) for x in re.findall(r"\b(?:BI|BP|BO|BK|BJ)=(\d+)", compiled.options)]
    small = case.startswith(_SMALL) or max(blocks, default=64) < 64
    wrong = problems(row, small, "warp_specialize" in compiled.kernel.asm["ttir"])
    return {"mode": mode, "n": n, **row, "problems": "; ".join(wrong)}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: most registers, shared memory and stages of each kernel on each chip."""
    chips = [f"sm_{c}" for c in CHIPS]
    lines = ["| kernel | operands | " + " | ".join(chips) + " |", "|" + "---|" * (2 + len(chips))]
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        kind = "16 bit" if row["operands"] in _SIXTEEN else "float32"
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


_SHOWN = ("registers", "shared_kib", "stages")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table; 1 when a kernel does not pass."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", default=",".join(map(str, CHIPS)))
    parser.add_argument("--quick", action="store_true", help="only what Boltz runs")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="print the README's table of a CSV")
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
        work = [pool.submit(measure, c, options.quick) for c in sorted(chips, reverse=True)]
        rows = [row for part in work for row in part.result()]
    rows.sort(key=lambda r: (r["kernel"], r["chip"], r["mode"], r["n"], r["constants"]))
    write_csv(options.out, rows)
    bad = [r for r in rows if r["problems"]]
    for r in bad:
        print(f"{r['kernel']} {r['chip']} {r['mode']} ({r['constants']}): {r['problems']}")
    print(f"{len(rows)} kernels for {len(chips)} chips, {len(bad)} with problems; {options.out}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
