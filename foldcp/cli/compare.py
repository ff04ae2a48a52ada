"""`foldcp compare A B`: compare two predictions, or two structures.

Compared are the positions of all atoms after superposition, lDDT, which needs none, and what the
confidence files of Boltz say. The tolerances are a few times what stock Boltz's own outputs move
when all its weights change by a relative 1e-7, which is what a different order of float32 additions
amounts to: two runs of one seed that both compute in float32 must stay within them. Chains and
atoms are matched by name: copies of a chain that changed places count as moved.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from foldcp.cli.similarity import lddt, rmsd, superposed
from foldcp.errors import UserError
from foldcp.output.results import Structure, find, read


@dataclass(frozen=True)
class Tolerance:
    """Largest and mean absolute difference allowed for one output, with the reason."""

    unit: str
    largest: float
    mean: float
    reason: str


_BIN_EDGE = "0.06 A in a pair whose distance crosses a bin edge"
TOLERANCES = {
    "coords": Tolerance("A", 0.05, 0.02, "floor of stock itself, 64 blocks: 0.01 A"),
    "plddt": Tolerance("", 1e-3, 2e-4, "floor 2e-4"),
    "pae": Tolerance("A", 0.25, 2e-3, f"floor 0.02 A, {_BIN_EDGE}"),
    "pde": Tolerance("A", 0.25, 2e-3, f"floor 0.03 A, {_BIN_EDGE}"),
    "ptm": Tolerance("", 1e-3, 1e-3, "floor 1e-5"),
    "iptm": Tolerance("", 1e-3, 1e-3, "floor 1e-5"),
    "affinity": Tolerance("", 1e-2, 1e-2, "log10 of IC50 in uM; it sees the structure"),
}


@dataclass(frozen=True)
class Difference:
    """One line of the comparison.

    Args:
        output: its name in `TOLERANCES`.
        span: least and largest value of the second one.
        largest: largest absolute difference.
        mean: mean absolute difference.
        tolerance: what is allowed.
    """

    output: str
    span: tuple[float, float]
    largest: float
    mean: float
    tolerance: Tolerance

    @property
    def passed(self) -> bool:
        """True when both differences are finite and within tolerance."""
        return self.largest <= self.tolerance.largest and self.mean <= self.tolerance.mean


@dataclass(frozen=True)
class Comparison:
    """Two predictions of one input.

    Args:
        atoms: how many there are.
        rmsd: angstrom, after superposition.
        as_written: angstrom, without.
        lddt: 0 to 1, of the first against the second, over all atoms of other residues within 15 A.
        differences: output by output, coordinates superposed.
    """

    atoms: int
    rmsd: float
    as_written: float
    lddt: float
    differences: list[Difference]

    @property
    def same(self) -> bool:
        """True when everything is within tolerance."""
        return all(line.passed for line in self.differences)


def compare(ours: Structure, stock: Structure) -> Comparison:
    """Compare two predictions of one input.

    Args:
        ours: the first one.
        stock: the one that it should equal.

    Raises:
        UserError: they do not have the same atoms, or an output has another shape.
    """
    if ours.atoms != stock.atoms:
        apart = sorted(set(ours.atoms) ^ set(stock.atoms))
        first = "".join(", such as {} {} {}".format(*key) for key in apart[:1])
        raise UserError(
            f"the structures have different atoms ({len(ours.atoms)} and {len(stock.atoms)}, "
            f"{len(apart)} in one of them only{first}): compare predictions of the same input"
        )
    if not ours.atoms:
        raise UserError("the structures have no atoms: nothing can be compared")
    moved = superposed(ours.coords, stock.coords)
    pairs = {"coords": (moved, stock.coords)}
    pairs |= {k: (ours.scores[k], stock.scores[k]) for k in TOLERANCES
              if k in ours.scores and k in stock.scores}  # fmt: skip
    differences = []
    for output, (a, b) in pairs.items():
        if a.shape != b.shape:
            raise UserError(f"{output} has shape {a.shape} in one and {b.shape} in the other")
        gap = np.abs(a.astype(np.float64) - b.astype(np.float64))
        if output == "coords":
            gap = np.linalg.norm(gap, axis=-1)
        gap = np.nan_to_num(gap, nan=np.inf)
        span = float(b.min()), float(b.max())
        tolerance = TOLERANCES[output]
        differences.append(Difference(output, span, float(gap.max()), float(gap.mean()), tolerance))
    return Comparison(
        len(moved), rmsd(moved, stock.coords), rmsd(ours.coords, stock.coords),
        lddt(ours.coords, stock.coords, [key[:2] for key in stock.atoms]), differences,
    )  # fmt: skip


def table(found: Comparison) -> str:
    """Return the comparison as text."""
    header = ("output", "second spans", "largest", "allowed", "mean", "allowed", "")
    rows = [header]
    for line in found.differences:
        unit = f" {line.tolerance.unit}".rstrip()
        rows.append((
            line.output, f"{line.span[0]:.3g} to {line.span[1]:.3g}{unit}",
            f"{line.largest:.2g}{unit}", f"{line.tolerance.largest:g}{unit}",
            f"{line.mean:.2g}{unit}", f"{line.tolerance.mean:g}{unit}",
            ("ok: " if line.passed else "TOO FAR: ") + line.tolerance.reason,
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join((
        f"{found.atoms:,} atoms: RMSD {found.rmsd:.3g} A superposed, {found.as_written:.3g} A as "
        f"written, lDDT {found.lddt:.4f}",
        *lines,
    ))  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison of two runs or structures.

    Returns:
        0 when everything is within tolerance, 1 when something is not.

    Raises:
        UserError: they cannot be compared.
    """
    parser = argparse.ArgumentParser(prog="foldcp compare", description=__doc__.partition("\n")[0])
    parser.add_argument("a", metavar="A", help="results folder, prediction or structure")
    parser.add_argument("b", metavar="B", help="the one that it should equal")
    parser.add_argument("--model", type=int, default=0, help="of each prediction, by rank (0)")
    options = parser.parse_args(argv)
    ours, stock = find(options.a), find(options.b)
    if len(ours) == len(stock) == 1:  # whatever their names
        (name, a), (other, b) = *ours.items(), *stock.items()
        both = {name or other or "structure": (a, b)}
        alone: set[str] = set()
    else:
        both = {name: (ours[name], stock[name]) for name in ours if name in stock}
        alone = set(ours) ^ set(stock)
    if not both:
        raise UserError(
            f"{options.a} and {options.b} have no input in common: name one prediction in each "
            "(boltz_results_.../predictions/NAME)"
        )
    apart = []
    for name, (a, b) in both.items():
        found = compare(read(a, options.model), read(b, options.model))
        print(f"{name}: {table(found)}")
        print(_verdict(found) + "\n")
        apart += [] if found.same else [name]
    if alone:
        print(f"in one of them only: {', '.join(sorted(alone))}")
    if len(both) > 1:
        print(f"{len(both) - len(apart)} of {len(both)} are the same")
    return 1 if apart or alone else 0


def _verdict(found: Comparison) -> str:
    if found.same:
        return "same structure"
    if not np.isfinite(found.rmsd):
        return "no structures: coordinates are missing or are no numbers"
    if found.lddt > 0.95 and found.rmsd < 15:  # lDDT says nothing of atoms farther apart
        return "similar structures, but beyond what rounding in float32 explains"
    return "different structures"
