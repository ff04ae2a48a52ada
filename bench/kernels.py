"""Time, memory and roofline fraction of every fused op against stock's torch and other packages.

    python -m bench.kernels                                  # all ops on the GPU (or CPU) at hand
    python -m bench.kernels --op triangle_attention_core --n 1024,2048 --dtype bf16
    python -m bench.kernels --providers foldcp,eager --within 60

All providers of a case run in one process and take turns (bench/timing.py). Each one's output is
checked first: in float64 at a small N, and in float32 at the N that is timed where that fits. One
that fails its check has status "wrong" and no time.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import eager, roofline
from bench.machine import own_folder, write_csv
from bench.providers import IN_PLACE, ON_CPU, PROVIDERS, Call, Unavailable
from bench.shapes import DTYPES, OPS, SEQUENCES, Draw, Inputs, Op, cast
from bench.timing import Clock, interleaved

SIZES = {"cuda": (256, 512, 1024, 2048, 4096), "cpu": (64, 128)}
CHECK_N = 136  # no multiple of 16, so that masked ends of blocks are checked too
TRUTH_N = 2048  # float32 truth at the timed N is left out beyond this: it takes seconds and 40 GB
# A gate against wrong functions, wider than the tests' 2x: largest error over the largest value,
# at most FACTOR times the larger of that of stock's torch in the same dtype and the floor.
# Float32 leaves room for three TF32 passes; bf16 rounds to 2^-9.
FACTOR, FLOORS = 4.0, {"fp32": 1e-5, "fp16": 1e-3, "bf16": 8e-3}
SLOW_TO_BUILD = ("compile",)  # checked at the timed N alone where that can be done
Build = Callable[[str, Inputs], Call]


@dataclass
class Outcome:
    """What became of one provider in one case."""

    status: str = "ok"
    reason: str = ""
    error: float | None = None
    error_at: int | str = ""
    peak_mib: float | None = None


def relative_error(out: Tensor, truth: Tensor, base: Tensor | None) -> float:
    """Largest |out - truth| over the largest |truth|, of the update where there is a residual."""
    if out.shape != truth.shape:
        return float("inf")
    if base is not None:
        out, truth = out.to(truth.dtype) - base.to(truth.dtype), truth - base.to(truth.dtype)
    worst = (out.to(truth.dtype) - truth).abs().max()
    error = float(worst / truth.abs().max().clamp(min=1e-30))
    return error if error == error else float("inf")


def error_of(op: Op, call: Call, t: Inputs, truth: Tensor) -> float:
    """The error of one call; an input that it changes in place is put back."""
    if op.residual is None:
        return relative_error(call(), truth, None)
    base = t[op.residual].clone()
    error = relative_error(call(), truth, base)
    t[op.residual].copy_(base)
    return error


def attempt(clock: Clock, outcome: Outcome, step: Callable[[], Any]) -> Any:
    """Run a step of a provider; what it raises becomes its status."""
    try:
        return step()
    except Unavailable as error:
        outcome.status, outcome.reason = "unavailable", str(error)
    except torch.OutOfMemoryError:
        outcome.status, outcome.reason = "oom", "out of device memory"
    except Exception as error:  # one provider must not end the others' run
        outcome.status = "failed"
        outcome.reason = (str(error).strip() or repr(error)).splitlines()[0][:200]
    clock.clear()
    return None


def allowed(dtype: str, of_stock: float) -> float:
    """Largest relative error that is taken for rounding."""
    return FACTOR * max(of_stock, FLOORS[dtype])


def judge(outcome: Outcome, error: float | None, bound: float, n: int) -> None:
    """Record a provider's error, and mark the provider when it is beyond the bound."""
    if outcome.status != "ok" or error is None:
        return
    outcome.error, outcome.error_at = error, n
    if not error <= bound:
        outcome.status = "wrong"
        outcome.reason = f"error {error:.2e} at N={n}; at most {bound:.2e} expected"


@dataclass
class Small:
    """The small case that providers are checked on, with its float64 result."""

    op: Op
    n: int
    t: Inputs
    truth: Tensor
    bound: float

    @classmethod
    def make(cls, op: Op, dtype: str, clock: Clock, n: int) -> Small:
        """Draw the case and compute its result and the error allowed."""
        t = op.make(Draw(DTYPES[dtype], clock.device, seed=1), n)
        with torch.no_grad():
            truth = eager.truth(op.name)(cast(t, torch.float64))
        stock = error_of(op, PROVIDERS["eager"](op.name, t), t, truth)
        return cls(op, n, t, truth, allowed(dtype, stock))

    def check(self, clock: Clock, build: Build, outcome: Outcome) -> None:
        """Build and run a provider on the case."""
        step = lambda: error_of(self.op, build(self.op.name, self.t), self.t, self.truth)  # noqa: E731
        judge(outcome, attempt(clock, outcome, step), self.bound, self.n)


def truth_at(op: Op, t: Inputs, n: int, clock: Clock) -> Tensor | None:
    """The result at the N that is timed, in float32; None where it does not fit."""
    if n > TRUTH_N:
        return None
    try:
        with torch.no_grad():
            return eager.EAGER[op.name](cast(t, torch.float32))
    except torch.OutOfMemoryError:
        clock.clear()
        return None


def run_case(
    op: Op,
    n: int,
    dtype: str,
    clock: Clock,
    providers: dict[str, Build],
    budget_s: float = 2.0,
) -> list[dict[str, Any]]:
    """Check and time every provider on one op.

    Args:
        op: the op.
        n: tokens.
        dtype: "bf16", "fp16" or "fp32".
        clock: of the device.
        providers: by name.
        budget_s: seconds of timing, about.

    Returns:
        One row of the table per provider.
    """
    outcomes = {name: Outcome() for name in providers}
    small = Small.make(op, dtype, clock, min(n, CHECK_N))
    truth = None
    try:
        t = op.make(Draw(DTYPES[dtype], clock.device), n)
        truth = truth_at(op, t, n, clock) if n > CHECK_N else None
    except torch.OutOfMemoryError:
        clock.clear()
        t = {}
    calls: dict[str, Call] = {}
    for name, build in providers.items():
        outcome = outcomes[name]
        if name not in SLOW_TO_BUILD or truth is None:
            small.check(clock, build, outcome)
        if not t and outcome.status == "ok":
            outcome.status, outcome.reason = "oom", "the inputs do not fit"
        if outcome.status != "ok":
            continue
        call = attempt(clock, outcome, lambda b=build: b(op.name, t))
        if call is not None and truth is not None:
            error = attempt(clock, outcome, lambda c=call: error_of(op, c, t, truth))
            judge(outcome, error, allowed(dtype, 0.0), n)
        if outcome.status == "ok":
            calls[name] = call
    truth = None
    for name, call in list(calls.items()):
        outcomes[name].peak_mib = attempt(clock, outcomes[name], lambda c=call: clock.peak_mib(c))
        if outcomes[name].status != "ok":
            calls.pop(name)
    times = interleaved(clock, calls, budget_s) if calls else {}
    rows = []
    for name, outcome in outcomes.items():
        row = {"op": op.name, "n": n, "dtype": dtype, "provider": name, "status": outcome.status}
        row |= _figures(op, n, dtype, clock.device, times.get(name))
        row["peak_mib"] = "" if outcome.peak_mib is None else round(outcome.peak_mib, 1)
        row["error"] = "" if outcome.error is None else f"{outcome.error:.2e}"
        row["error_at"] = outcome.error_at
        row["reason"] = outcome.reason or (times[name].remark() if name in times else "")
        rows.append(row)
    return rows


def _figures(op: Op, n: int, dtype: str, device: torch.device, times: Any) -> dict[str, Any]:
    names = ("ms", "p20", "p80", "tflops", "gbs", "roofline_ms", "roofline_fraction", "bound")
    row: dict[str, Any] = dict.fromkeys(names, "")
    size, sequences = DTYPES[dtype].itemsize, SEQUENCES[device.type]
    least = None
    if device.type == "cuda":
        chip = roofline.chip_named(torch.cuda.get_device_name(device))
        if chip is not None:
            least = roofline.floor(op.name, n, size, chip, sequences)
            row |= {"roofline_ms": f"{least.ms:.4g}", "bound": least.bound}
    if times is not None:
        work = roofline.kernels(op.name, n, size, sequences)
        row |= {k: f"{getattr(times, k):.4g}" for k in ("ms", "p20", "p80")}
        row["tflops"] = f"{sum(k.flops for k in work) / times.ms / 1e9:.4g}"
        row["gbs"] = f"{sum(k.bytes for k in work) / times.ms / 1e6:.4g}"
        if least is not None:
            row["roofline_fraction"] = round(least.ms / times.ms, 3)
    return row


_said: set[str] = set()  # a package that is missing is missing in every case


def say(rows: Sequence[dict[str, Any]]) -> None:
    """Print one case: its providers' times, or why they have none."""
    first = rows[0]
    stock = next((float(r["ms"]) for r in rows if r["provider"] == "eager" and r["ms"]), None)
    print(f"{first['op']} N={first['n']} {first['dtype']} (floor {first['roofline_ms'] or '-'} ms)")
    for row in rows:
        if row["status"] != "ok":
            if row["status"] != "unavailable" or row["reason"] not in _said:
                print(f"  {row['provider']:15} {row['status']}: {row['reason']}")
            _said.add(row["reason"])
            continue
        notes = [f"{stock / float(row['ms']):.2f}x eager"] if stock else []
        if row["roofline_fraction"] != "":
            notes.append(f"{row['roofline_fraction']:.0%} of the roofline")
        if row["peak_mib"] != "":
            notes.append(f"{row['peak_mib']:.0f} MiB")
        print(f"  {row['provider']:15} {float(row['ms']):10.4f} ms  {', '.join(notes)}", flush=True)


def _list(text: str, allowed_: Sequence[str], what: str) -> list[str]:
    names = list(allowed_) if text == "all" else text.split(",")
    for name in names:
        if name not in allowed_:
            raise SystemExit(f"{what} must be among {', '.join(allowed_)}, got {name!r}")
    return names


def main(argv: list[str] | None = None) -> int:
    """Run the cases and write the table; 1 when a provider of ours is wrong or fails."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    parser = argparse.ArgumentParser(prog="python -m bench.kernels")
    parser.add_argument("--op", default="all", help="comma-separated; all")
    parser.add_argument("--without", default="", help="ops to leave out, comma-separated")
    parser.add_argument("--n", default=",".join(map(str, SIZES[device.type])))
    parser.add_argument("--dtype", default="bf16" if on_gpu else "fp32", help="comma-separated")
    parser.add_argument("--providers", default="all" if on_gpu else ",".join(ON_CPU))
    parser.add_argument("--budget", type=float, default=2.0, help="seconds of timing per case")
    parser.add_argument("--within", type=float, default=0, help="start no case after these seconds")
    parser.add_argument("--out", type=Path, default=own_folder() / "kernels.csv")
    options = parser.parse_args(argv)
    left_out = options.without.split(",")
    ops = [x for x in _list(options.op, list(OPS), "--op") if x not in left_out]
    names = _list(options.providers, list(PROVIDERS), "--providers")
    dtypes = _list(options.dtype, list(DTYPES), "--dtype")
    clock, start, rows = Clock(device), time.monotonic(), []
    # All ops at the first N before the second N: put first what matters most.
    for n, op, dtype in ((int(n), o, d) for n in options.n.split(",") for o in ops for d in dtypes):
        if options.within and time.monotonic() - start > options.within:
            print(f"left out, {options.within:.0f} s are over: {op} N={n} {dtype}")
            continue
        found = run_case(OPS[op], n, dtype, clock, {x: PROVIDERS[x] for x in names}, options.budget)
        say(found)
        rows += found
        write_csv(options.out, rows)  # after each case: a run that is cut short keeps its rows
        gc.collect()
        clock.clear()
    print(f"{len(rows)} rows in {options.out}")
    bad = [r for r in rows if r["provider"] in IN_PLACE and r["status"] in ("wrong", "failed")]
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
