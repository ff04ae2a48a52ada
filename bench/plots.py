"""Plots of the tables of one machine, one PNG per table: `python -m bench.plots [FOLDER]`.

Figures are never edited: run this again when a table changes. Rows without status "ok" are left
out. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.machine import ROOT, results_folder

COLOURS = {
    "foldcp": "#0072b2", "foldcp-torch": "#56b4e9", "eager": "#555555", "stock": "#555555",
    "compile": "#999999", "cuequivariance": "#d55e00", "stock-kernels": "#d55e00",
    "trifast": "#009e73", "floor": "#000000",
}  # fmt: skip
COLUMNS = 4
Row = dict[str, str]


def read(path: Path) -> list[Row]:
    """The rows of a table."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _lines(ax: Any, rows: list[Row], series: str, value: str) -> None:
    names = dict.fromkeys(r[series] for r in rows)
    for name in names:
        kept = [r for r in rows if r[series] == name and r.get(value) and r.get("status") == "ok"]
        points = sorted((int(r["n"]), float(r[value])) for r in kept)
        if points:
            ax.plot(*zip(*points, strict=True), marker="o", ms=3, lw=1.2, label=name,
                    color=COLOURS.get(name))  # fmt: skip
    _scales(ax)


def _scales(ax: Any) -> None:
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:.0f}")
    ax.set_yscale("log")
    ax.set_xlabel("N")
    ax.grid(alpha=0.3)


def _panels(count: int) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(count, COLUMNS)
    lines = -(-count // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(3.4 * columns, 2.8 * lines), squeeze=False, layout="constrained"
    )
    flat = list(axes.flat)
    for ax in flat[count:]:
        ax.set_visible(False)
    return figure, flat


def _finish(figure: Any, rows: list[Row], path: Path, where: str = "") -> Path:
    first = rows[0]
    where = where or first.get("gpu") or first["machine"]
    figure.suptitle(f"{where}, commit {first['commit']}", size=9)
    figure.savefig(path, dpi=110)
    return path


def kernels(rows: list[Row], path: Path) -> Path:
    """Milliseconds over N, a panel per op and dtype, with the roofline."""
    cases = list(dict.fromkeys((r["op"], r["dtype"]) for r in rows))
    figure, axes = _panels(len(cases))
    for ax, (op, dtype) in zip(axes, cases, strict=False):
        mine = [r for r in rows if (r["op"], r["dtype"]) == (op, dtype)]
        _lines(ax, mine, "provider", "ms")
        floor = sorted({(int(r["n"]), float(r["roofline_ms"])) for r in mine if r["roofline_ms"]})
        if floor:
            ax.plot(*zip(*floor, strict=True), "--", lw=1, color=COLOURS["floor"], label="roofline")
        ax.set_title(f"{op}, {dtype}", size=8)
        ax.set_ylabel("ms")
    axes[0].legend(fontsize=6)
    return _finish(figure, rows, path)


def block(rows: list[Row], path: Path) -> Path:
    """Milliseconds and memory over N of the pairformer block and the token transformer."""
    parts = list(dict.fromkeys(r["part"] for r in rows))
    values = [v for v in ("ms", "peak_mib") if any(r[v] for r in rows)] or ["ms"]
    figure, axes = _panels(len(parts) * len(values))
    for i, part in enumerate(parts):
        for j, value in enumerate(values):
            ax = axes[i * len(values) + j]
            _lines(ax, [r for r in rows if r["part"] == part], "side", value)
            ax.set_title(part, size=8)
            ax.set_ylabel(value)
    axes[0].legend(fontsize=6)
    return _finish(figure, rows, path)


def predict(rows: list[Row], path: Path) -> Path:
    """Seconds and memory over N of whole predictions."""
    values = [v for v in ("seconds", "peak_mib") if any(r[v] for r in rows)] or ["seconds"]
    figure, axes = _panels(len(values))
    for ax, value in zip(axes, values, strict=False):
        _lines(ax, rows, "side", value)
        ax.set_ylabel(value)
    axes[0].legend(fontsize=6)
    return _finish(figure, rows, path)


def roofline(rows: list[Row], path: Path) -> Path:
    """Modelled floors and predictions of the ops with targets, beside what others published."""
    ops = list(dict.fromkeys(r["op"] for r in rows if r["target_at_most_ms"]))
    chips = list(dict.fromkeys(r["chip"] for r in rows))
    figure, axes = _panels(len(ops) * len(chips))
    series = {
        "roofline_ms_modelled": ("--", "floor (modelled)"),
        "predicted_ms_modelled": ("-", "prediction (modelled)"),
        "target_at_most_ms": ("v", "target"),
        "target_aim_ms": ("^", "aim"),
        "flashpairformer_ms_published": ("x", "FlashPairformer (published)"),
    }
    for i, op in enumerate(ops):
        for j, chip in enumerate(chips):
            ax = axes[i * len(chips) + j]
            mine = [r for r in rows if r["op"] == op and r["chip"] == chip]
            for key, (style, label) in series.items():
                points = [(int(r["n"]), float(r[key])) for r in mine if r[key]]
                if points:
                    ax.plot(*zip(*points, strict=True), style, lw=1, ms=5, label=label)
            _scales(ax)
            ax.set_ylabel("ms")
            ax.set_title(f"{op}, {chip}", size=8)
            ax.legend(fontsize=5)
    return _finish(figure, rows, path, "modelled, not measured")


PLOTS: dict[str, Callable[[list[Row], Path], Path]] = {
    "kernels": kernels, "block": block, "predict": predict, "roofline": roofline,
}  # fmt: skip


def draw(folder: Path) -> list[Path]:
    """Draw every table of a folder that there is a plot for: `<name>*.csv` -> the same with .png.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    made = []
    for path in sorted(folder.glob("*.csv")):
        plot = next((f for name, f in PLOTS.items() if path.stem.startswith(name)), None)
        if plot is not None and (rows := read(path)):
            made.append(plot(rows, path.with_suffix(".png")))
    return made


def main(argv: list[str] | None = None) -> int:
    """Draw the plots of this machine and of the roofline, or of the folders named."""
    parser = argparse.ArgumentParser(prog="python -m bench.plots")
    parser.add_argument("folder", type=Path, nargs="*")
    options = parser.parse_args(argv)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print(
            "bench.plots needs matplotlib: pip install matplotlib (the tables are complete without)"
        )
        return 1
    for folder in options.folder or [results_folder(), ROOT / "bench" / "results"]:
        for path in draw(folder):
            print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
