"""Measure configurations of the kernels on the GPU at hand and keep the fastest.

    python -m bench.tune [--kernel attention_32] [--n 1024] [--dry-run]

Nothing is tuned unless this is run. What it finds goes to the user's cache
(`foldcp_kernels.fused.configs.cache_file`), which later runs on this kind of GPU read; deleting
that file brings the shipped table back. A candidate whose result differs from that of the shipped
configuration by more than rounding is dropped, however fast it is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.shapes import OPS, Draw
from bench.timing import Clock, interleaved
from foldcp_kernels.fused import configs
from foldcp_kernels.fused.configs import Config

DTYPE = torch.bfloat16
SAME = 2e-2  # of the largest value: another order of sums in bf16, not another function


@dataclass(frozen=True)
class Search:
    """Candidates of one kernel and the op that times them.

    Args:
        op: case of bench.shapes. blocks: values of each block size. warps, stages: values.
    """

    op: str
    blocks: dict[str, tuple[int, ...]]
    warps: tuple[int, ...] = (4, 8)
    stages: tuple[int, ...] = (2, 3)

    def candidates(self) -> list[Config]:
        """Every combination."""
        out = []
        for sizes in itertools.product(*self.blocks.values()):
            blocks = dict(zip(self.blocks, sizes, strict=True))
            out += [Config(blocks, w, s) for w in self.warps for s in self.stages]
        return out


_ROWS = {"ROWS": (1, 2, 4), "BI": (64, 128), "BK": (32, 64), "LAZY": (0, 1)}
_ONE = {"ROWS": (1,), "BI": (64, 128), "BK": (32, 64), "LAZY": (0, 1)}
SEARCHES: dict[str, Search] = {
    "attention_32": Search("triangle_attention_core", _ROWS),
    "attention_32_masked": Search("triangle_attention_core_masked", _ROWS),
    "attention_64": Search("token_attention_diffusion", _ROWS),
    "attention_32_single": Search("token_attention_trunk", _ONE),
    "attention_32_window": Search(
        "atom_attention", {"ROWS": (1, 2, 4), "BI": (32,), "BK": (32, 64, 128), "LAZY": (0,)},
        (1, 2, 4), (1, 2),
    ),
    "norm_linear": Search("token_bias", {"BP": (64, 128), "BO": (32, 64, 128)}),
    "norm_linear_gated": Search("triangle_multiplication", {"BP": (64, 128), "BO": (32, 64)}),
    "multiplication_output": Search("triangle_multiplication", {"BP": (64, 128), "BO": (32, 64)}),
    "attention_output": Search("triangle_attention", {"BP": (64, 128), "BH": (32, 64)}),
    "transition": Search("transition_pair", {"BP": (64, 128), "BH": (32, 64)}),
    "outer_product_mean": Search(
        "outer_product_mean", {"BM": (64, 128), "BN": (128,), "BK": (64, 128), "BS": (32, 64)}
    ),
    "expected_values": Search("pae_head", {"BP": (64, 128), "BK": (32, 64)}),
}  # fmt: skip


def fastest(
    search: Search,
    apply: Callable[[Config | None], None],
    call: Callable[[], Tensor],
    clock: Clock,
    seconds: float = 0.3,
) -> tuple[Config | None, float, float]:
    """The fastest candidate of one kernel.

    Args:
        search: its candidates. apply: makes a configuration the one in use, None the shipped one.
        call: runs the op; its result is compared. clock: of the device. seconds: for each timing.

    Returns:
        (configuration, None when the shipped one stays; its ms; the shipped one's ms).
    """
    apply(None)
    with torch.no_grad():
        want = call().float()
        shipped = interleaved(clock, {"shipped": call}, seconds)["shipped"].ms
        best: tuple[Config | None, float] = (None, shipped)
        for candidate in search.candidates():
            apply(candidate)
            try:
                error = (call().float() - want).abs().max() / want.abs().max()
                if not error <= SAME:
                    continue
                ms = interleaved(clock, {"it": call}, seconds)["it"].ms
            except Exception as error:  # out of registers or shared memory, as the chip decides
                print(f"  {candidate.options()}: {str(error).splitlines()[0][:90]}")
                continue
            # A gain below the spread of repeats is none.
            if ms < 0.98 * best[1]:
                best = (candidate, ms)
    apply(None)
    return *best, shipped


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune and write the cache."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", action="append", choices=list(SEARCHES))
    parser.add_argument("--n", type=int, default=1024)
    parser.add_argument("--dry-run", action="store_true", help="measure, write nothing")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.tune measures on a GPU, and none is visible here", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    chip = sum(x * y for x, y in zip(torch.cuda.get_device_capability(), (10, 1), strict=True))
    clock, path = Clock(device), configs.cache_file()
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for kernel in options.kernel or SEARCHES:
        found, ms, shipped = _tune(kernel, chip, options.n, clock)
        print(f"{kernel}: {shipped:.3f} ms shipped, {ms:.3f} ms {found or 'stays'}", flush=True)
        if found is None:
            continue
        source = f"bench.tune on {torch.cuda.get_device_name()} at N={options.n}: {ms:.3f} ms"
        key = f"{kernel}/2/{configs.family(chip)}"
        known[key] = vars(Config(found.blocks, found.warps, found.stages, source))
    if not options.dry_run:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known, indent=1))
        print(f"written to {path}")
    return 0


def _tune(kernel: str, chip: int, n: int, clock: Clock) -> tuple[Config | None, float, float]:
    from bench.providers import FOLDCP

    search = SEARCHES[kernel]
    op = OPS[search.op]
    inputs = op.make(Draw(DTYPE, clock.device), n)
    base = None if op.residual is None else inputs[op.residual].clone()
    run = FOLDCP[search.op](inputs, "triton")

    def call() -> Tensor:
        if base is not None:
            inputs[op.residual].copy_(base)  # the same input for every candidate
        return run()

    return fastest(search, lambda c: configs.override(kernel, 2, chip, c), call, clock)


if __name__ == "__main__":
    sys.exit(main())
