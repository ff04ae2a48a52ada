"""Compare the files of two `boltz predict` runs: `python -m bench.compare RUN_A RUN_B`.

Both runs must have used the same input, weights, seed and float32. The tolerances stand in one
table with their reasons; they are a few times what stock Boltz's own outputs move when all its
weights change by a relative 1e-7, which is what a different order of float32 additions amounts to.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gemmi
import numpy as np


@dataclass(frozen=True)
class Prediction:
    """One model of one input, as Boltz's writer leaves it.

    Args:
        coords: angstrom, [atoms, 3].
        plddt: [tokens], 0 to 1.
        pae: angstrom, [tokens, tokens].
        pde: angstrom, [tokens, tokens].
        ptm: 0 to 1.
        iptm: 0 to 1.
    """

    coords: np.ndarray
    plddt: np.ndarray
    pae: np.ndarray
    pde: np.ndarray
    ptm: np.ndarray
    iptm: np.ndarray


@dataclass(frozen=True)
class Tolerance:
    """How far one output may differ: its largest and its mean absolute difference, and why."""

    unit: str
    largest: float
    mean: float
    reason: str


BIN_EDGE = "0.06 A in a pair whose distance crosses a bin edge"
TOLERANCES = {
    "coords": Tolerance("A", 0.05, 0.02, "floor of stock itself, 64 blocks: 0.01 A"),
    "plddt": Tolerance("", 1e-3, 2e-4, "floor 2e-4"),
    "pae": Tolerance("A", 0.25, 2e-3, f"floor 0.02 A, {BIN_EDGE}"),
    "pde": Tolerance("A", 0.25, 2e-3, f"floor 0.03 A, {BIN_EDGE}"),
    "ptm": Tolerance("", 1e-3, 1e-3, "floor 1e-5"),
    "iptm": Tolerance("", 1e-3, 1e-3, "floor 1e-5"),
}


@dataclass(frozen=True)
class Difference:
    """One line of the comparison."""

    output: str
    span: tuple[float, float]
    largest: float
    mean: float
    tolerance: Tolerance

    @property
    def passed(self) -> bool:
        """Whether both differences are finite and within tolerance."""
        return self.largest <= self.tolerance.largest and self.mean <= self.tolerance.mean


def read(run: str | Path, model: int = 0) -> Prediction:
    """Read one prediction of a run with one input.

    Args:
        run: Boltz's `boltz_results_*` folder.
        model: rank of the sample by confidence.
    Returns:
        The prediction.
    Raises:
        FileNotFoundError: the folder does not hold exactly one input, or a file is missing.
    """
    folders = [path for path in (Path(run) / "predictions").glob("*") if path.is_dir()]
    if len(folders) != 1:
        raise FileNotFoundError(f"{run}: expected one folder in predictions/, got {len(folders)}")
    folder = folders[0]
    name = f"{folder.name}_model_{model}"
    summary = json.loads((folder / f"confidence_{name}.json").read_text())
    matrices = {key: np.load(folder / f"{key}_{name}.npz")[key] for key in ("plddt", "pae", "pde")}
    table = gemmi.cif.read(str(folder / f"{name}.cif")).sole_block()
    columns = table.find("_atom_site.", ["Cartn_x", "Cartn_y", "Cartn_z"])
    coords = np.array([[float(value) for value in row] for row in columns])
    scores = {key: np.array(summary[key]) for key in ("ptm", "iptm")}
    return Prediction(coords=coords, **matrices, **scores)


def compare(ours: Prediction, stock: Prediction) -> list[Difference]:
    """Compare two predictions output by output; coordinates are not superposed.

    Args:
        ours: the run under test.
        stock: the run it should equal.
    Returns:
        One `Difference` per entry of `TOLERANCES`.
    Raises:
        ValueError: an output has another shape.
    """
    differences = []
    for output, tolerance in TOLERANCES.items():
        a, b = getattr(ours, output), getattr(stock, output)
        if a.shape != b.shape:
            raise ValueError(f"{output}: got shape {a.shape}, stock Boltz wrote {b.shape}")
        gap = np.abs(a.astype(np.float64) - b.astype(np.float64))
        if output == "coords":
            gap = np.linalg.norm(gap, axis=-1)
        gap = np.nan_to_num(gap, nan=np.inf)
        span = (float(b.min()), float(b.max()))
        differences.append(Difference(output, span, float(gap.max()), float(gap.mean()), tolerance))
    return differences


def table(differences: Sequence[Difference]) -> str:
    """Return the comparison as text, one line per output."""
    header = ("output", "stock spans", "largest", "allowed", "mean", "allowed", "")
    rows = [header]
    for line in differences:
        unit = f" {line.tolerance.unit}".rstrip()
        rows.append((
            line.output, f"{line.span[0]:.3g} to {line.span[1]:.3g}{unit}",
            f"{line.largest:.2g}{unit}", f"{line.tolerance.largest:g}{unit}",
            f"{line.mean:.2g}{unit}", f"{line.tolerance.mean:g}{unit}",
            ("ok: " if line.passed else "TOO FAR: ") + line.tolerance.reason,
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison of two runs; return 1 when they differ beyond tolerance."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("ours", type=Path, help="boltz_results_* folder of the run under test")
    parser.add_argument("stock", type=Path, help="boltz_results_* folder of stock Boltz")
    options = parser.parse_args(argv)
    differences = compare(read(options.ours), read(options.stock))
    print(table(differences))
    return 0 if all(line.passed for line in differences) else 1


if __name__ == "__main__":
    sys.exit(main())
