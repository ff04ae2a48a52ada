"""One pairformer block and the token transformer of one diffusion step, against stock Boltz-2.

Real dimensions (C = 128, C_s = 384; 24 layers of 16 heads x 48 over 5 samples), the same random
weights on both sides, and foldcp on a 1x1 mesh. Pair ops run under bf16 autocast on a GPU as in
`boltz predict`, the diffusion step in float32 as there. Outputs are compared with stock in float32
at a small N first.

    python -m bench.block                    # the GPU at hand, or a CPU at small sizes
    python -m bench.block --n 512,1024 --part pairformer

`stock` is plain torch, `stock-kernels` Boltz with cuEquivariance's kernels (pairformer only).
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.kernels import CHECK_N, Outcome, attempt, relative_error
from bench.machine import results_folder, write_csv
from bench.shapes import LAYERS, PAIR, SAMPLES, SINGLE, TOKEN, TOKEN_HEADS
from bench.timing import Clock, interleaved

SIZES = {"cuda": "256,512,1024,2048", "cpu": "64"}
PARTS = ("pairformer", "token_transformer")
SIDES = {
    "pairformer": ("stock", "stock-kernels", "foldcp"),
    "token_transformer": ("stock", "foldcp"),
}
CHUNK, LONG, SHORT_CHUNK = 128, 384, 512  # how Boltz's pairformer chunks triangle attention
# Largest error over the largest value, against stock in float32: at most FACTOR times that of
# stock in the precision that is timed, or the floor (float32: order of additions; bf16: 2^-8).
FACTOR, FLOORS = 3.0, {torch.float32: 1e-4, torch.bfloat16: 4e-3}

Outputs = tuple[Tensor, ...]
Step = Callable[[], Outputs]


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill a module so that every part of it matters to the output: in place, and returned."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            x = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(x * 0.5 * p.shape[-1] ** -0.5)
            else:
                p.copy_(x * 0.1 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return module.eval().requires_grad_(False)


class Pairformer:
    """The block's inputs and how each side runs it."""

    dtype = torch.bfloat16  # of autocast on a GPU

    def __init__(self, device: torch.device) -> None:
        from boltz.model.layers.pairformer import PairformerLayer

        self.device = device
        self.stock = randomised(PairformerLayer(SINGLE, PAIR, num_heads=TOKEN_HEADS, v2=True))
        self.stock.to(device)

    def inputs(self, n: int) -> Outputs:
        """s [1, n, C_s] and z [1, n, n, C], float32."""
        generator = torch.Generator(self.device).manual_seed(n)
        return tuple(
            torch.randn(shape, device=self.device, generator=generator)
            for shape in ((1, n, SINGLE), (1, n, n, PAIR))
        )

    def step(self, side: str, inputs: Outputs) -> Step:
        """A callable that runs the block; foldcp changes z in place."""
        s, z = inputs
        n = s.shape[1]
        if side == "foldcp":
            from foldcp.layout import PairLayout
            from foldcp.mesh import Mesh
            from foldcp.modules.pairformer import PairformerLayer, pair_mask

            layer = PairformerLayer(copy.copy(self.stock), Mesh.create(1, 1, self.device))
            layout = PairLayout(n, 1, 1, 0)
            mask = pair_mask(layout, self.device)
            return lambda: layer(s, z, layout, mask)
        ones = torch.ones(1, n, n, device=self.device)
        chunk = CHUNK if n > LONG else SHORT_CHUNK
        kernels = side == "stock-kernels"
        if kernels:
            _cuequivariance()
        return lambda: self.stock(s, z, ones[:, 0], ones, chunk, use_kernels=kernels)


class TokenTransformer:
    """The 24 conditioned layers of one diffusion step, with 5 samples."""

    dtype = None  # float32: Boltz switches autocast off around its sampler

    def __init__(self, device: torch.device, layers: int = LAYERS) -> None:
        from boltz.model.modules.transformersv2 import DiffusionTransformer

        self.device, self.layers = device, layers
        stock = DiffusionTransformer(layers, TOKEN_HEADS, dim=TOKEN, dim_single_cond=TOKEN)
        self.stock = randomised(stock).to(device)

    def inputs(self, n: int) -> Outputs:
        """a [5, n, C], its conditioning [1, n, C], and the biases [1, layers * H, n, n]."""
        generator = torch.Generator(self.device).manual_seed(n)
        shapes = ((SAMPLES, n, TOKEN), (1, n, TOKEN), (1, self.layers * TOKEN_HEADS, n, n))
        return tuple(torch.randn(x, device=self.device, generator=generator) for x in shapes)

    def step(self, side: str, inputs: Outputs) -> Step:
        """A callable that runs the layers."""
        a, s, bias = inputs
        n = a.shape[1]
        if side == "foldcp":
            from foldcp.layout import PairLayout
            from foldcp.mesh import Mesh
            from foldcp.modules.token_transformer import token_transformer

            layout, mesh = PairLayout(n, 1, 1, 0), Mesh.create(1, 1, self.device)
            tiles = bias[0].unflatten(0, (self.layers, TOKEN_HEADS)).unbind(0)
            return lambda: (token_transformer(self.stock.layers, a, s, tiles, layout, mesh),)
        # Stock holds the biases with the heads last.
        last = bias.permute(0, 2, 3, 1).contiguous()
        every, mask = s.expand_as(a).contiguous(), torch.ones(SAMPLES, n, device=self.device)
        return lambda: (self.stock(a, every, last, mask, multiplicity=SAMPLES),)


BUILD = {"pairformer": Pairformer, "token_transformer": TokenTransformer}


def _cuequivariance() -> None:
    from bench.providers import _package

    _package("cuequivariance_torch")
    _package("cuequivariance_ops_torch")


def run(step: Step, device: torch.device, dtype: torch.dtype | None) -> Outputs:
    """One call as `boltz predict` makes it: no gradients, autocast where it has it."""
    low = dtype is not None and device.type == "cuda"
    with torch.no_grad(), torch.autocast(device.type, dtype=dtype if low else None, enabled=low):
        return step()


def check(part: Any, side: str, n: int) -> tuple[float, float]:
    """(error, bound) of a side against stock in float32 at a small N."""
    low = part.dtype if part.device.type == "cuda" else None

    def outputs(name: str, dtype: torch.dtype | None) -> Outputs:
        fresh = part.inputs(n)
        return tuple(x.float() for x in run(part.step(name, fresh), part.device, dtype))

    truth = outputs("stock", None)

    def error(found: Outputs) -> float:
        return max(relative_error(a, b, None) for a, b in zip(found, truth, strict=True))

    floor = FLOORS[low or torch.float32]
    return error(outputs(side, low)), FACTOR * max(error(outputs("stock", low)), floor)


def run_part(part: Any, name: str, n: int, clock: Clock, budget_s: float) -> list[dict[str, Any]]:
    """Check and time every side of one part at one N; a row each."""
    outcomes = {side: Outcome() for side in SIDES[name]}
    calls: dict[str, Callable[[], Outputs]] = {}
    low = part.dtype if clock.cuda else None
    inputs = None
    for side, outcome in outcomes.items():
        found = attempt(clock, outcome, lambda x=side: check(part, x, min(n, CHECK_N)))
        if found is not None:
            outcome.error, bound = found
            if not outcome.error <= bound:
                outcome.status = "wrong"
                outcome.reason = f"error {outcome.error:.2e}; at most {bound:.2e} expected"
        if outcome.status != "ok":
            continue
        if inputs is None:
            inputs = attempt(clock, outcome, lambda: part.inputs(n))
            if inputs is None:
                continue
        step = attempt(clock, outcome, lambda x=side, t=inputs: part.step(x, t))
        if step is None:
            continue
        call = lambda x=step: run(x, part.device, low)  # noqa: E731
        outcome.peak_mib = attempt(clock, outcome, lambda c=call: clock.peak_mib(c))
        if outcome.status == "ok":
            calls[side] = call
    times = interleaved(clock, calls, budget_s) if calls else {}
    stock = times.get("stock")
    rows = []
    for side, outcome in outcomes.items():
        t = times.get(side)
        row: dict[str, Any] = {"part": name, "n": n, "side": side, "status": outcome.status}
        row["dtype"] = "bf16" if low else "fp32"
        row |= {k: f"{getattr(t, k):.4g}" if t else "" for k in ("ms", "p20", "p80")}
        row["speedup_over_stock"] = round(stock.ms / t.ms, 3) if stock and t else ""
        row["peak_mib"] = "" if outcome.peak_mib is None else round(outcome.peak_mib, 1)
        row["error"] = "" if outcome.error is None else f"{outcome.error:.2e}"
        row["reason"] = outcome.reason
        rows.append(row)
        said = f"{row['ms']} ms, {row['speedup_over_stock']}x stock, {row['peak_mib'] or '-'} MiB"
        print(f"{name} N={n} {side:14} {said if t else outcome.status + ': ' + outcome.reason}",
              flush=True)  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the parts and write the table; 1 when foldcp is wrong or fails."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(prog="python -m bench.block")
    parser.add_argument("--n", default=SIZES[device.type])
    parser.add_argument("--part", default=",".join(PARTS), help=", ".join(PARTS))
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the token transformer")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds of timing per case")
    parser.add_argument("--within", type=float, default=0, help="start no case after these seconds")
    parser.add_argument("--out", type=Path, default=results_folder() / "block.csv")
    options = parser.parse_args(argv)
    try:
        import boltz.model.layers.pairformer  # noqa: F401
    except ImportError as error:
        print(f"bench.block needs Boltz, which is not importable here: {error}")
        return 0
    clock, start, rows = Clock(device), time.monotonic(), []
    for name in options.part.split(","):
        if name not in PARTS:
            raise SystemExit(f"--part must be among {', '.join(PARTS)}, got {name!r}")
        extra = {"layers": options.layers} if name == "token_transformer" else {}
        part = BUILD[name](device, **extra)
        for n in (int(x) for x in options.n.split(",")):
            if options.within and time.monotonic() - start > options.within:
                print(f"left out, {options.within:.0f} s are over: {name} N={n}")
                continue
            rows += run_part(part, name, n, clock, options.budget)
            write_csv(options.out, rows)
            gc.collect()
            clock.clear()
    print(f"{len(rows)} rows in {options.out}")
    return int(any(r["side"] == "foldcp" and r["status"] in ("wrong", "failed") for r in rows))


if __name__ == "__main__":
    raise SystemExit(main())
