"""A picture of two predictions of one protein: one on top of the other, and where they differ.

Left, the traces of the C-alpha atoms after superposition, seen along the direction in which they
are flattest; right, by residue, how far the atoms are apart and what pLDDT says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bench.demo.words import distance
from foldcp.cli.compare import TOLERANCES
from foldcp.cli.similarity import rmsd, superposed
from foldcp.output.results import Structure

STOCK, OURS, LIMIT = "#c4c4c4", "#0072b2", "#d55e00"
ALONG = "viridis"  # from the first residue to the last
LEAST = 1e-5  # angstrom, for the logarithm; files of structures have three to five decimals
STEPS = 8  # of the curve between two residues


def draw(ours: Structure, stock: Structure, path: Path, names: tuple[str, str]) -> Path:
    """Draw two predictions of one input.

    Args:
        ours: the first one, which is moved onto the other.
        stock: the second one, with the same atoms.
        path: PNG to write.
        names: what the two are called in the picture.

    Returns:
        `path`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(11, 5.6), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.25, 1))
    moved = superposed(ours.coords, stock.coords)
    _traces(figure.add_subplot(grid[:, 0]), moved, stock, names)
    away = figure.add_subplot(grid[0, 1])
    _distances(away, moved, stock)
    _confidence(figure.add_subplot(grid[1, 1], sharex=away), ours, stock, names)
    figure.suptitle(
        f"{names[0]} and {names[1]}: RMSD {distance(rmsd(moved, stock.coords))} "
        f"over {len(moved):,} atoms"
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def alphas(atoms: list[tuple[str, str, str]]) -> np.ndarray:
    """Return the numbers of the C-alpha atoms, in order."""
    return np.array([i for i, (_, _, name) in enumerate(atoms) if name == "CA"], dtype=int)


def by_residue(atoms: list[tuple[str, str, str]], values: np.ndarray) -> np.ndarray:
    """Return the largest value [atoms] within each residue, [residues]."""
    numbers = {key: i for i, key in enumerate(dict.fromkeys(atom[:2] for atom in atoms))}
    largest = np.zeros(len(numbers))
    np.maximum.at(largest, [numbers[atom[:2]] for atom in atoms], values)
    return largest


def smooth(trace: np.ndarray, steps: int = STEPS) -> np.ndarray:
    """Return a curve through points [points, 3], with so many steps between two: Catmull-Rom."""
    ends = np.vstack((2 * trace[0] - trace[1], trace, 2 * trace[-1] - trace[-2]))
    p, q, r, s = (ends[i : len(ends) - 3 + i, None] for i in range(4))
    t = np.linspace(0, 1, steps, endpoint=False)[:, None]
    cubic = -p + 3 * q - 3 * r + s
    between = q + 0.5 * t * (r - p + t * (2 * p - 5 * q + 4 * r - s + t * cubic))
    return np.vstack((between.reshape(-1, 3), trace[-1:]))


def _traces(ax: Any, moved: np.ndarray, stock: Structure, names: tuple[str, str]) -> None:
    """Draw both traces in short pieces, from the back to the front."""
    from matplotlib import colormaps
    from matplotlib.lines import Line2D

    chosen = alphas(stock.atoms)
    center = stock.coords[chosen].mean(0)
    _, _, axes = np.linalg.svd(stock.coords[chosen] - center, full_matrices=False)
    pieces = []
    for chain in dict.fromkeys(stock.atoms[i][0] for i in chosen):
        mine = [i for i in chosen if stock.atoms[i][0] == chain]
        if len(mine) > 1:
            both = [smooth((x[mine] - center) @ axes.T) for x in (stock.coords, moved)]
            along = np.linspace(0, 0.95, len(both[0]) - 1)
            # The thin line reaches into its neighbours, whose wide ones end upon it.
            pieces += [
                (both[0][i : i + 2], both[1][max(0, i - 2) : i + 4], colormaps[ALONG](along[i]))
                for i in range(len(along))
            ]
    for order, (wide, narrow, colour) in enumerate(sorted(pieces, key=lambda x: x[0][:, 2].mean())):
        # A white edge parts what crosses in front from what lies behind.
        for ends, width, shade, cap in (
            (wide, 8.5, "white", "butt"), (wide, 6, STOCK, "round"), (narrow, 2, colour, "round")
        ):  # fmt: skip
            ax.plot(*ends[:, :2].T, color=shade, lw=width, solid_capstyle=cap, zorder=2 + order)
    for i, name in ((chosen[0], "first residue"), (chosen[-1], "last residue")):
        ax.annotate(
            name, ((stock.coords[i] - center) @ axes.T)[:2], xytext=(9, 9), size=8,
            textcoords="offset points", zorder=3 + len(pieces),
            bbox={"boxstyle": "round", "fc": "white", "ec": "none", "alpha": 0.8},
        )  # fmt: skip
    ax.margins(0.06)
    ax.set_aspect("equal")
    ax.set_xlabel("Å")
    ax.set_ylabel("Å")
    ax.set_title("C-alpha traces, superposed", size=10)
    kinds = [
        Line2D([], [], color=STOCK, lw=6, label=f"{names[1]} (wide, grey)"),
        Line2D([], [], color=colormaps[ALONG](0.5), lw=2,
               label=f"{names[0]} (thin, from dark at the first residue to light at the last)"),
    ]  # fmt: skip
    ax.legend(handles=kinds, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1))


def _distances(ax: Any, moved: np.ndarray, stock: Structure) -> None:
    away = by_residue(stock.atoms, np.linalg.norm(moved - stock.coords, axis=-1))
    ax.semilogy(range(1, len(away) + 1), np.maximum(away, LEAST), color=OURS, lw=1.2)
    ax.axhline(TOLERANCES["coords"].largest, color=LIMIT, ls="--", lw=1, label="allowed")
    ax.set_ylabel("Å")
    ax.set_title("largest shift of an atom, by residue", size=10)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)


def _confidence(ax: Any, ours: Structure, stock: Structure, names: tuple[str, str]) -> None:
    for prediction, name, colour, width in (
        (stock, names[1], STOCK, 5), (ours, names[0], OURS, 1.2)
    ):  # fmt: skip
        if "plddt" in prediction.scores:
            plddt = 100 * prediction.scores["plddt"].reshape(-1)
            ax.plot(range(1, len(plddt) + 1), plddt, color=colour, lw=width, label=name)
    ax.set_xlabel("residue")
    ax.set_ylabel("pLDDT")
    ax.set_title("confidence (pLDDT, 0 to 100), by residue", size=10)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
