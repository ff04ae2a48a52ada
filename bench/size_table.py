"""Largest inputs by cards and GPUs, **modelled, not measured**: the planner's count of bytes.

    python -m bench.size_table          # bench/results/model/sizes.csv
    python -m bench.size_table --plot   # docs/images/sizes.png from it, needs matplotlib

One sample, 1,024 MSA rows, lean memory, the most square mesh. Stock's limits are those that its
users report on one card of 24 GB and of 80 GB; on other cards N^2 is taken to grow with the memory,
by a line through these two. GPUs do not move stock's limit: it never splits a sample.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bench.machine import ROOT, write_csv
from bench.plots import read
from foldcp.layout.mesh_shape import choose
from foldcp.planner.gpus import parse
from foldcp.planner.plan import of_setup, setup_of
from foldcp.planner.workload import Workload

OUT = ROOT / "bench" / "results" / "model" / "sizes.csv"
PLOT = ROOT / "docs" / "images" / "sizes.png"
CARDS = {24: "rtx4090", 48: "l40s", 80: "h100", 141: "h200", 180: "b200", 288: "b300"}
COUNTS = (1, 2, 4, 8, 16, 64, 256)
ATOMS_PER_TOKEN, ROWS, STEP = 8, 1024, 64
STOCK = {24: 1300, 80: 2400}  # reported by users
# Of Fold-CP, by card and GPUs: "about 20,000" and "more than 30,000" are as they say.
PUBLISHED = {(80, 4): 3605, (80, 256): 20_000, (288, 64): 30_000}


def largest(card: int, count: int) -> int:
    """The most tokens that fit, a multiple of `STEP`."""
    cluster = replace(parse(f"{count}x{CARDS[card]}"), memory=card * 10**9)

    def fits(steps: int) -> bool:
        workload = Workload(steps * STEP, steps * STEP * ATOMS_PER_TOKEN, ROWS)
        setup = setup_of(workload, choose(count), "lean")
        return of_setup(workload, cluster, setup, timed=False).fits

    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * STEP


def stock(card: int) -> int:
    """Stock's limit: as reported, else on the line of N^2 over memory."""
    if card in STOCK:
        return STOCK[card]
    (a, n), (b, m) = STOCK.items()
    return round((n * n + (m * m - n * n) * (card - a) / (b - a)) ** 0.5 / 10) * 10


def rows() -> list[dict[str, Any]]:
    """All rows of the table."""
    return [
        {
            "card_gb": card,
            "gpus": count,
            "tokens": largest(card, count),
            "stock_tokens": stock(card),
            "stock_from": "reported" if card in STOCK else "scaled",
            "fold_cp_published": PUBLISHED.get((card, count), ""),
        }
        for card in CARDS
        for count in COUNTS
    ]


def plot() -> None:
    """Draw the table."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    found = read(OUT)
    for card in CARDS:
        of = [r for r in found if int(r["card_gb"]) == card]
        (line,) = ax.plot(
            [int(r["gpus"]) for r in of],
            [int(r["tokens"]) for r in of],
            marker="o",
            ms=3,
            label=f"{card} GB",
        )
        ax.axhline(int(of[0]["stock_tokens"]), color=line.get_color(), ls=":", lw=0.8)
        points = [r for r in of if r["fold_cp_published"]]
        ax.plot(
            [int(r["gpus"]) for r in points],
            [int(r["fold_cp_published"]) for r in points],
            "*",
            ms=11,
            color=line.get_color(),
        )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter("{x:.0f}")
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.set_xlabel("GPUs")
    ax.set_ylabel("tokens")
    ax.set_title("Largest input, modelled; dotted: stock, stars: published by Fold-CP", fontsize=9)
    ax.grid(alpha=0.3)
    ax.legend(title="memory of a card", fontsize=8)
    figure.savefig(PLOT, dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table, or draw it."""
    parser = argparse.ArgumentParser(prog="python -m bench.size_table", description=__doc__)
    parser.add_argument("--plot", action="store_true")
    if parser.parse_args(arguments).plot:
        plot()
    else:
        write_csv(OUT, rows())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
