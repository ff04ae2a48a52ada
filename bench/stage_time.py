"""Seconds of the stages of a prediction, modelled, and how far off the model is on CPU ranks.

**Modelled, not measured on a GPU**: what `foldcp.planner.stage_time` says of the complex that
Fold-CP reports on 4 x H100, with every assumption.

    python -m bench.stage_time                   # bench/results/model/stage_time.csv
    python -m bench.stage_time --rates FILE      # kernels' rates as measured
    python -m bench.stage_time --validate        # bench/results/model/cpu_validation.csv

`--validate` runs predictions on CPU ranks: rates of kernels, host and link are fitted to two of
them, and the seconds of three others, of other sizes and meshes, are predicted. Seconds are those
that a core worked, which ranks on a machine of their own take by the clock too; both are in the
table.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.machine import ROOT, write_csv
from bench.stage_time_cpu import DIMS, run, workload
from foldcp.layout.strategies import ATTENTION, MULTIPLICATION, Sizes
from foldcp.planner.choice import cheapest
from foldcp.planner.rates import CPU, H100, H200, HOPPER, ONE_MACHINE, Chip
from foldcp.planner.stage_time import (
    ASSUMED,
    STAGES,
    KernelRates,
    StageSeconds,
    assumptions,
    read_rates,
    shared,
    stage_seconds,
)
from foldcp.planner.stage_time.kernel_rates import KERNELS
from foldcp.planner.stage_time.parts import Case
from foldcp.planner.workload import Setup, Workload
from foldcp_kernels.core.chunking import DEFAULT_BYTES

OUT = ROOT / "bench" / "results" / "model" / "stage_time.csv"
VALIDATED = OUT.with_name("cpu_validation.csv")
CHAINS = (2102, 858, 521, 124)  # of the complex that Fold-CP reports, 3,605 tokens
ATOMS_PER_TOKEN = 7.9  # heavy atoms of a residue, about
PUBLISHED_S = 300  # five samples on 4 x H100: "under 5 minutes"
MACHINES = ((H200, 1, 1), (H100, 2, 2), (H100, 2, 4))
# (tokens, rows, cols): what rates are fitted to, and what is predicted.
FITTED = ((192, 1, 1), (128, 2, 2))
PREDICTED = ((288, 1, 1), (256, 1, 2), (320, 2, 2))
AT_MOST = 0.25  # of the error of a predicted total


def setup_of(tokens: int, rows: int, cols: int, on_cpu: bool = False) -> Setup:
    """The setup that a mesh runs with by default.

    Args:
        tokens: N.
        rows: rows of the mesh.
        cols: columns of the mesh.
        on_cpu: of CPU ranks, which compute in float32.
    """
    itemsize, largest = 4 if on_cpu else 2, DEFAULT_BYTES["cpu" if on_cpu else "cuda"]
    names = {}
    for op in (MULTIPLICATION, ATTENTION):
        given = (rows, cols), "direct", Sizes(4, itemsize), on_cpu, largest
        one = rows * cols == 1
        names[op] = "panel-direct" if one else cheapest(op, tokens, *given)
    return Setup(
        rows, cols, multiplication=names[MULTIPLICATION], attention=names[ATTENTION],
        itemsize=itemsize, chunk_bytes=largest,
    )  # fmt: skip


def complex_of(samples: int = 5) -> Workload:
    """The complex that Fold-CP reports, with an alignment of 1,024 rows.

    Args:
        samples: diffusion samples.
    """
    tokens = sum(CHAINS)
    return Workload(tokens, round(ATOMS_PER_TOKEN * tokens), 1024, 0, samples)


def table(rates: KernelRates = ASSUMED) -> Iterator[dict[str, Any]]:
    """Rows of the table: each stage on each machine, and the sum of them.

    Args:
        rates: what kernels reach.
    """
    given = complex_of()
    for chip, rows, cols in MACHINES:
        found = stage_seconds(given, setup_of(given.tokens, rows, cols), chip, HOPPER, rates)
        of_all = [sum(getattr(s, name) for s in found.values()) for name in vars(StageSeconds())]
        for stage, s in (*found.items(), ("total", StageSeconds(*of_all))):
            yield {
                "gpus": f"{rows * cols} x {chip.name}",
                "mesh": f"{rows}x{cols}",
                "tokens": given.tokens,
                "samples": given.samples,
                "stage": stage,
                **{f"{k[:-2]}_s_modelled": f"{getattr(s, k):.4g}" for k in _SECONDS},
                "received_gb": f"{s.received_bytes / 1e9:.4g}",
                "hidden_modelled": f"{s.hidden:.3f}",
                "rates": rates.origin,
            }


_SECONDS = ("total_s", "compute_s", "exposed_s", "host_s", "transfer_s")


def items(tokens: int, rows: int, cols: int, rates: KernelRates, cores: int) -> dict[str, float]:
    """Modelled seconds of stages and of ops on CPU ranks.

    Args:
        tokens: N.
        rows: rows of the mesh.
        cols: columns of the mesh.
        rates: what kernels reach.
        cores: that the ranks share.
    """
    chip, links = shared(CPU, ONE_MACHINE, rows * cols, cores)
    given, setup = workload(tokens), setup_of(tokens, rows, cols, on_cpu=True)
    found = stage_seconds(given, setup, chip, links, rates, DIMS)
    seconds = {name: s.total_s for name, s in found.items()}
    seconds["total"] = sum(seconds.values())
    case = Case(given, setup, DIMS, chip, links, rates)
    blocks = DIMS.pairformer_blocks + DIMS.msa_blocks + given.samples * DIMS.confidence_blocks
    for op, name in ((MULTIPLICATION, setup.multiplication), (ATTENTION, setup.attention)):
        part = case.triangle(op, name, DIMS.token_z)
        seconds[op] = blocks * case.seconds(part).total_s
    return seconds


def fit(measured: Mapping[tuple[int, int, int], Mapping[str, float]], cores: int) -> KernelRates:
    """Fit the rates of kernels, host and link to measured seconds.

    Args:
        measured: by tokens and mesh the seconds of stages and ops.
        cores: that the ranks share.

    Returns:
        Rates whose seconds have the least squares of logarithmic errors, each weighted with its
        part of its run.
    """

    def error(fractions: dict[str, float]) -> float:
        rates, total = KernelRates(fractions, "fitted"), 0.0
        for run_of, seconds in measured.items():
            model = items(*run_of, rates, cores)
            for name, value in model.items():
                if value > 0 and seconds.get(name, 0) > 1e-3:
                    part = seconds[name] / seconds["total"]
                    total += part * math.log(value / seconds[name]) ** 2
        # Rates that no item tells apart stay near what is stated.
        return total + 1e-4 * sum(math.log(f) ** 2 for f in fractions.values())

    best = dict.fromkeys((*KERNELS, "link", "host"), 1.0)
    least, width = error(best), 2.0
    while width > 1.02:
        before = least
        for name in best:
            for factor in (width, 1 / width):
                tried = best | {name: best[name] * factor}
                if (found := error(tried)) < least:
                    best, least = tried, found
        if least > 0.995 * before:
            width = math.sqrt(width)
    return KernelRates(best, "fitted")


def validate(
    repeats: int, measure: Callable[..., Mapping[str, tuple[float, float]]] = run
) -> tuple[list[dict[str, Any]], KernelRates]:
    """Fit to two runs and predict three.

    Args:
        repeats: predictions of each run, of which the fastest counts.
        measure: as `bench.stage_time_cpu.run`.

    Returns:
        A row for each stage of each run, and the rates.
    """
    cores = os.cpu_count() or 1
    found = {}
    for run_of in (*FITTED, *PREDICTED):
        found[run_of] = measure(*run_of, repeats)
        print(f"{run_of}: {found[run_of]['total'][0]:.2f} s", flush=True)
    used = {of: {k: v[1] for k, v in x.items()} for of, x in found.items()}
    rates = fit({of: used[of] for of in FITTED}, cores)
    rows = []
    for run_of, seconds in found.items():
        n, r, c = run_of
        model = items(*run_of, rates, cores)
        for name in (*STAGES, MULTIPLICATION, ATTENTION, "total"):
            if name in seconds and model[name]:
                clock, core = seconds[name]
                rows.append(
                    {"tokens": n, "mesh": f"{r}x{c}"}
                    | {"role": "fitted" if run_of in FITTED else "predicted", "item": name}
                    | {"modelled_s": f"{model[name]:.4g}", "core_s": f"{core:.4g}"}
                    | {"clock_s": f"{clock:.4g}", "error": f"{model[name] / core - 1:.3f}"}
                    | {"error_by_clock": f"{model[name] / clock - 1:.3f}"}
                )
    return rows, rates


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        print(" ".join(f"{k}={v}" for k, v in row.items()), flush=True)


def _show(rates: KernelRates) -> None:
    given = complex_of()
    print(f"{given}; {ATOMS_PER_TOKEN} atoms a token")
    for chip, r, c in MACHINES:
        setup = setup_of(given.tokens, r, c)
        print(f"\n{r * c} x {chip.name}: {setup}")
        print("\n".join(f"  {line}" for line in assumptions(chip, HOPPER, setup, rates)))
    print()


def main(argv: Sequence[str] | None = None) -> int:
    """Write the table, or validate the model; 1 when a prediction is too far off."""
    parser = argparse.ArgumentParser(prog="python -m bench.stage_time")
    parser.add_argument("--validate", action="store_true", help="on CPU ranks; minutes")
    parser.add_argument("--rates", type=Path, help="rates.csv of measured kernels")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    if options.validate:
        rows, fitted = validate(options.repeats)
        _print(rows)
        print("\n".join(fitted.described()))
        write_csv(options.out or VALIDATED, rows)
        totals = [r for r in rows if r["item"] == "total" and r["role"] == "predicted"]
        return int(any(abs(float(r["error"])) > AT_MOST for r in totals))
    chip: Chip = H100
    rates = read_rates(options.rates, chip) if options.rates else ASSUMED
    _show(rates)
    rows = list(table(rates))
    _print(rows)
    write_csv(options.out or OUT, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
