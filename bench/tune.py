"""Measure configurations of the kernels on the GPU at hand and keep the fastest.

    python -m bench.tune [--kernel attention_32] [--n 1024] [--dry-run]
    python -m bench.tune --hottest 8 --within 60 --out DIR

Nothing is tuned unless this is run. What it finds goes to the user's cache
(`foldcp_kernels.core.triton_configs.cache_file`), which later runs on this kind of GPU read;
deleting that file brings the shipped table back. Every kernel's listed candidates come first, then
all other combinations for as long as there is time. A candidate whose result differs from that of
the shipped configuration by more than rounding is dropped, however fast it is."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.machine import write_csv
from bench.shapes import OPS, Draw
from bench.timing import Clock, interleaved
from foldcp_kernels.core import triton_configs as configs
from foldcp_kernels.core.triton_configs import Config

DTYPE = torch.bfloat16
SAME = 2e-2  # of the largest value: another order of sums in bf16, not another function


@dataclass(frozen=True)
class Search:
    """Candidates of one kernel and the op that times them.

    Args:
        op: case of bench.shapes.
        blocks: values of each block size.
        warps: values of num_warps.
        stages: values of num_stages.
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


_ROWS = {
    "ROWS": (1, 2, 4), "GROUP": (12,), "BI": (64, 128), "BK": (32, 64), "LAZY": (0, 1)
}  # fmt: skip
_ONE = {"ROWS": (1,), "GROUP": (12,), "BI": (64, 128), "BK": (32, 64), "LAZY": (0, 1)}
# The hottest first: what takes most of a predict at N = 1024 by bench.roofline and calls of each.
SEARCHES: dict[str, Search] = {
    "attention_32": Search("triangle_attention_core", _ROWS),
    "multiplication_output": Search("triangle_multiplication", {"BP": (64, 128), "BO": (32, 64)}),
    "attention_output": Search("triangle_attention", {"BP": (64, 128), "BH": (32, 64)}),
    "transition": Search("transition_pair", {"BP": (64, 128), "BH": (32, 64)}),
    "norm_linear_gated": Search("triangle_multiplication", {"BP": (64, 128), "BO": (32, 64)}),
    "attention_64": Search("token_attention_diffusion", _ROWS),
    "norm_linear": Search("token_bias", {"BP": (64, 128), "BO": (32, 64, 128)}),
    "outer_product_mean": Search(
        "outer_product_mean", {"BM": (64, 128), "BN": (128,), "BK": (64, 128), "BS": (32, 64)}
    ),
    "attention_32_single": Search("token_attention_trunk", _ONE),
    "attention_32_masked": Search("triangle_attention_core_masked", _ROWS),
    "attention_32_window": Search(
        "atom_attention",
        {"ROWS": (1, 2, 4), "GROUP": (12,), "BI": (32,), "BK": (32, 64, 128), "LAZY": (0,)},
        (1, 2, 4), (1, 2),
    ),
    "expected_values": Search("pae_head", {"BP": (64, 128), "BK": (32, 64)}),
}  # fmt: skip


@dataclass
class Kernel:
    """What is known of one kernel.

    Args:
        name: in `SEARCHES`.
        apply: makes a configuration the one in use, None the shipped one.
        call: runs the op; its result is compared.
        seconds: for each timing; 0 times one call.
    """

    name: str
    apply: Callable[[Config | None], None]
    call: Callable[[], Tensor]
    seconds: float = 0.3
    shipped: float = 0.0
    best: tuple[Config | None, float] = (None, 0.0)
    rows: list[dict[str, Any]] = field(default_factory=list)
    want: Tensor | None = None

    def start(self, clock: Clock) -> None:
        """Time what ships."""
        self.apply(None)
        with torch.no_grad():
            self.want = self.call().float()
            self.shipped = self._ms(clock)
        self.best = (None, self.shipped)

    def try_out(self, clock: Clock, candidate: Config) -> None:
        """Compare and time one candidate."""
        self.apply(candidate)
        row = {"kernel": self.name, "configuration": json.dumps(candidate.options())}
        row |= {"ms": "", "shipped_ms": round(self.shipped, 4), "status": "ok", "reason": ""}
        self.rows.append(row)
        try:
            with torch.no_grad():
                error = float((self.call().float() - self.want).abs().max() / self.want.abs().max())
                if not error <= SAME:
                    row |= {"status": "wrong", "reason": f"differs by {error:.1e}"}
                    return
                ms = self._ms(clock)
        except Exception as error:  # out of registers or shared memory, as the chip decides
            row |= {"status": "failed", "reason": str(error).splitlines()[0][:90]}
            return
        finally:
            self.apply(None)
        row["ms"] = round(ms, 4)
        # A gain below the spread of repeats is none.
        if ms < 0.98 * self.best[1]:
            self.best = (candidate, ms)

    def _ms(self, clock: Clock) -> float:
        if not self.seconds:
            return clock.once(self.call)[0]
        return interleaved(clock, {"it": self.call}, self.seconds)["it"].ms


def search(
    kernels: Sequence[str],
    chip: str,
    make: Callable[[str], Kernel],
    clock: Clock,
    left: Callable[[], float],
    most: int | None = None,
) -> list[Kernel]:
    """Try candidates: of every kernel those that the table lists, then of every kernel the others.

    Args:
        kernels: in `SEARCHES`.
        chip: of configs.family.
        make: the kernel of a name, ready to run.
        clock: of the device.
        left: seconds that are left.
        most: candidates of a kernel, None: all.

    Returns:
        The kernels that were reached.
    """
    found: dict[str, Kernel] = {}
    for listed in (True, False):
        for name in kernels:
            table = configs.candidates(name, 2, chip)
            known = [c.options() for c in table]
            others = [c for c in SEARCHES[name].candidates() if c.options() not in known]
            tried = len(found[name].rows) if name in found else 0
            todo = list(table[1:] if listed else others)[: None if most is None else most - tried]
            if not todo or left() <= 0:
                continue
            kernel = make(name)
            if name in found:  # its inputs were given back after the first round
                kernel.best, kernel.rows = found[name].best, found[name].rows
                kernel.want, kernel.shipped = kernel.call().float(), found[name].shipped
            else:
                kernel.start(clock)
            found[name] = kernel
            for candidate in todo:
                if left() > 0:
                    kernel.try_out(clock, candidate)
            kernel.call, kernel.want = None, None
            said = kernel.best[0].options() if kernel.best[0] else "stays"
            print(f"{name}: {kernel.shipped:.3f} ms shipped, {kernel.best[1]:.3f} ms {said}")
    return list(found.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune and write the cache."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", action="append", choices=list(SEARCHES))
    parser.add_argument("--hottest", type=int, help="only so many kernels, the hottest")
    parser.add_argument("--within", type=float, default=3600, help="seconds in all, about")
    parser.add_argument("--n", type=int, default=1024)
    parser.add_argument("--out", type=Path, help="folder for tune.csv, a row per candidate")
    parser.add_argument("--dry-run", action="store_true", help="measure, leave the cache alone")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, interpreted, tiny")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.within
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        print("bench.tune measures on a GPU, and none is visible here", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.rehearse else "cuda")
    capability = (0, 0) if options.rehearse else torch.cuda.get_device_capability()
    chip = 10 * capability[0] + capability[1]
    clock, n = Clock(device), 8 if options.rehearse else options.n
    names = options.kernel or list(SEARCHES)[: options.hottest]
    found = search(
        names, configs.family(chip), lambda name: _kernel(name, chip, n, clock), clock,
        lambda: end - time.monotonic(), 1 if options.rehearse else None,
    )  # fmt: skip
    rows = [row | {"chip": configs.family(chip), "n": n} for k in found for row in k.rows]
    if options.out and rows:
        write_csv(options.out / "tune.csv", rows)
    if not options.dry_run and not options.rehearse:
        _keep(found, chip, n)
    return 0


def _keep(found: Sequence[Kernel], chip: int, n: int) -> None:
    """Add what is faster than the shipped table to the user's cache."""
    path = configs.cache_file()
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for kernel in found:
        best, ms = kernel.best
        if best is not None:
            source = f"bench.tune on {torch.cuda.get_device_name()} at N={n}: {ms:.3f} ms"
            key = f"{kernel.name}/2/{configs.family(chip)}"
            known[key] = vars(Config(best.blocks, best.warps, best.stages, source))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=1))
    print(f"written to {path}")


def _kernel(name: str, chip: int, n: int, clock: Clock) -> Kernel:
    """A kernel with its op in the benchmark's shapes."""
    from bench.providers import FOLDCP

    op = OPS[SEARCHES[name].op]
    interpreted = clock.device.type == "cpu"  # where bfloat16 products are wrong
    inputs = op.make(Draw(torch.float16 if interpreted else DTYPE, clock.device), n)
    base = None if op.residual is None else inputs[op.residual].clone()
    run = FOLDCP[op.name](inputs, "triton")

    def call() -> Tensor:
        if base is not None:
            inputs[op.residual].copy_(base)  # the same input for every candidate
        return run()

    return Kernel(
        name, lambda c: configs.override(name, 2, chip, c), call, 0.0 if interpreted else 0.3
    )


if __name__ == "__main__":
    sys.exit(main())
