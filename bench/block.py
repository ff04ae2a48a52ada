"""One pairformer block, one diffusion step and its token transformer, against stock Boltz-2.

Real dimensions (C = 128, C_s = 384; 24 layers of 16 heads x 48 over 5 samples, 8 atoms a token),
the same random weights on both sides, and foldcp on a 1x1 mesh. Pair ops run under bf16 autocast on
a GPU as in `boltz predict`, the diffusion step in float32 as there. Outputs are compared with stock
in float32 at a small N first. What no step changes is made before the clock starts, on both sides
where stock allows it.

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
import torch.nn.functional as F
from torch import Tensor, nn

from bench.kernels import CHECK_N, Outcome, attempt, relative_error
from bench.machine import own_folder, write_csv
from bench.shapes import ATOMS_PER_TOKEN, LAYERS, PAIR, SAMPLES, SINGLE, TOKEN, TOKEN_HEADS
from bench.timing import Clock, interleaved
from foldcp.layout.tiles import PairLayout

SIZES = {"cuda": "256,512,1024,2048", "cpu": "64"}
PARTS = ("pairformer", "diffusion_step", "token_transformer")
SIDES = {
    "pairformer": ("stock", "stock-kernels", "foldcp"),
    "diffusion_step": ("stock", "foldcp"),
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


def padded(x: Tensor, layout: PairLayout, *dims: int) -> Tensor:
    """A tensor over all tokens along `dims` as a 1x1 mesh holds it; itself without padding."""
    missing = layout.padded - layout.n
    sides = [(0, missing if d in dims else 0) for d in reversed(range(x.ndim))]
    return F.pad(x, sum(sides, ())) if missing else x


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
            from foldcp.fabric.mesh import Mesh
            from foldcp.modules.trunk.pairformer import PairformerLayer

            mesh = Mesh.create(1, 1, self.device)
            layer, layout = PairformerLayer(copy.copy(self.stock), mesh), mesh.layout(n)
            s, z = padded(s, layout, 1), padded(z, layout, 1, 2)

            def block() -> Outputs:
                single, pair = layer(s, z, layout)
                return single[:, :n], pair[:, :n, :n]

            return block
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
            from foldcp.fabric.mesh import Mesh
            from foldcp.modules.diffusion.token_transformer import token_transformer

            mesh = Mesh.create(1, 1, self.device)
            layout = mesh.layout(n)
            a, s, bias = padded(a, layout, 1), padded(s, layout, 1), padded(bias, layout, 2, 3)
            tiles = bias[0].unflatten(0, (self.layers, TOKEN_HEADS)).unbind(0)
            layers = self.stock.layers
            return lambda: (token_transformer(layers, a, s, tiles, layout, mesh)[:, :n],)
        # Stock holds the biases with the heads last.
        last = bias.permute(0, 2, 3, 1).contiguous()
        every, mask = s.expand_as(a).contiguous(), torch.ones(SAMPLES, n, device=self.device)
        return lambda: (self.stock(a, every, last, mask, multiplicity=SAMPLES),)


class DiffusionStep:
    """One call of the score model for 5 samples: atoms to tokens, 24 layers, and back."""

    dtype = None  # float32, as for the token transformer

    def __init__(self, device: torch.device, layers: int = LAYERS) -> None:
        from boltz.model.modules.diffusion_conditioning import DiffusionConditioning
        from boltz.model.modules.diffusionv2 import DiffusionModule

        depth = dict(
            atom_encoder_depth=3, atom_encoder_heads=4, token_transformer_depth=layers,
            token_transformer_heads=TOKEN_HEADS, atom_decoder_depth=3, atom_decoder_heads=4,
        )  # fmt: skip
        windows = dict(atoms_per_window_queries=32, atoms_per_window_keys=128)
        sizes = dict(token_s=SINGLE, token_z=PAIR, atom_s=128, atom_z=16, atom_feature_dim=388)
        self.device = device
        self.conditioning = randomised(DiffusionConditioning(**sizes, **windows, **depth)).to(
            device
        )
        self.stock = randomised(DiffusionModule(SINGLE, 128, **windows, **depth)).to(device)

    def inputs(self, n: int) -> Outputs:
        """s_inputs, s [1, n, C_s], z, relative positions [1, n, n, C] and noisy atoms [5, A, 3]."""
        generator = torch.Generator(self.device).manual_seed(n)
        atoms = -(-n * ATOMS_PER_TOKEN // 32) * 32
        single, pair = (1, n, SINGLE), (1, n, n, PAIR)
        shapes = (single, single, pair, pair, (SAMPLES, atoms, 3))
        return tuple(torch.randn(x, device=self.device, generator=generator) for x in shapes)

    def step(self, side: str, inputs: Outputs) -> Step:
        """A callable that runs the score model on prepared conditioning."""
        from foldcp.boltz.families.dry_run.features import features
        from foldcp.boltz.features.dense import dense_view

        s_inputs, s, z, relpos, noisy = inputs
        n = s.shape[1]
        torch.manual_seed(n)  # of the reference conformers: both sides get the same
        feats = {name: x.to(self.device) for name, x in features(n).items()}
        times = torch.full((SAMPLES,), 0.3, device=self.device)
        if side == "foldcp":
            return self._foldcp(feats, inputs, times)
        view = dense_view(feats)
        feats = {name: view[name] for name in view}
        with torch.no_grad():
            made = self.conditioning(s, z, relpos, feats)
        names = ("q", "c", "to_keys", "atom_enc_bias", "atom_dec_bias", "token_trans_bias")
        made = dict(zip(names, made, strict=True))
        return lambda: (self.stock(s_inputs, s, noisy, times, feats, made, SAMPLES),)

    def _foldcp(self, feats: dict[str, Tensor], inputs: Outputs, times: Tensor) -> Step:
        from foldcp.boltz.families import boltz2_options
        from foldcp.fabric.mesh import Mesh
        from foldcp.layout.tiles import AtomLayout
        from foldcp.modules.diffusion.conditioning import DiffusionConditioning
        from foldcp.modules.diffusion.score_model import DiffusionModule

        s_inputs, s, z, relpos, noisy = inputs
        mesh = Mesh.create(1, 1, self.device)
        layout, atoms = mesh.layout(s.shape[1]), AtomLayout(noisy.shape[1] // 32, 1, 0)
        s_inputs, s = padded(s_inputs, layout, 1), padded(s, layout, 1)
        z, relpos = padded(z, layout, 1, 2), padded(relpos, layout, 1, 2)
        score = DiffusionModule(copy.copy(self.stock), mesh)
        options = boltz2_options.diffusion_conditioning(self.conditioning)
        conditioning = DiffusionConditioning(copy.copy(self.conditioning), mesh, options)
        with torch.no_grad():
            made = conditioning(s, z, lambda lo, hi: relpos[:, lo:hi], feats, layout, atoms)
            prepared = score.prepare(made, s_inputs, s, feats, layout, atoms)
            time = score.embed_times(times[:1])[0]
        return lambda: (score(prepared, noisy, score.condition(prepared, time)),)


BUILD = {
    "pairformer": Pairformer,
    "diffusion_step": DiffusionStep,
    "token_transformer": TokenTransformer,
}


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
        row["reason"] = outcome.reason or (t.remark() if t else "")
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
    parser.add_argument("--out", type=Path, default=own_folder() / "block.csv")
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
        extra = {} if name == "pairformer" else {"layers": options.layers}
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
