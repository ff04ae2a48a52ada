"""`foldcp compare A B`: compare two predictions, or two structures.

Compared are the positions of all atoms after superposition, lDDT, which needs none, and what the
confidence files of Boltz say. The tolerances are a few times what stock Boltz's own outputs move
when all its weights change by a relative 1e-7, which is what a different order of float32 additions
amounts to: two runs of one seed that both compute in float32 must stay within them. Chains and
atoms are matched by name: copies of a chain that changed places count as moved.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foldcp.cli.similarity import lddt, rmsd, superposed
from foldcp.errors import UserError

STRUCTURES = (".cif", ".pdb", ".mmcif", ".ent")
Array = NDArray[Any]


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
class Prediction:
    """One model of one input, or a structure alone.

    Args:
        atoms: chain, residue and name of each atom.
        coords: [atoms, 3], angstrom.
        scores: of Boltz by name: "plddt" [tokens], "pae" and "pde" [tokens, tokens] (angstrom),
            "ptm", "iptm", "affinity" [1]; those that were written.
    """

    atoms: list[tuple[str, str, str]]
    coords: Array
    scores: dict[str, Array] = field(default_factory=dict)


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


def find(path: str | Path) -> dict[str, Path]:
    """Look for the predictions of a path.

    Args:
        path: a results folder of `boltz predict` (`boltz_results_*`), the folder that holds it, the
            folder of one prediction, or a structure.

    Returns:
        By name of the input: the folder of its prediction, or the structure under the name "".

    Raises:
        UserError: there is nothing of this kind.
    """
    path = Path(path)
    if path.is_file() and path.suffix.lower() in STRUCTURES:
        return {"": path}
    inside = [path / "predictions", *sorted(path.glob("boltz_results_*/predictions"))]
    for folder in (inside[0], *(inside[1:] if len(inside) == 2 else ())):
        found = {x.name: x for x in sorted(folder.glob("*")) if _models(x)}
        if found:
            return found
    if _models(path):
        return {path.name: path}
    why = "holds no prediction" if path.exists() else "does not exist"
    if len(inside) > 2:
        why = f"holds several folders ({', '.join(x.parent.name for x in inside[1:])})"
    raise UserError(
        f"{path} {why}: name a folder boltz_results_..., the folder of one prediction in it, or a "
        f"structure ({', '.join(STRUCTURES)})"
    )


def _models(folder: Path) -> list[Path]:
    found = [folder / f"{folder.name}_model_0{suffix}" for suffix in (".cif", ".pdb")]
    return [path for path in found if path.is_file()]


def read(path: Path, model: int = 0) -> Prediction:
    """Read a prediction.

    Args:
        path: of `find`.
        model: rank of the sample by confidence.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    if path.is_file():
        return Prediction(*_structure(path))
    name = f"{path.name}_model_{model}"
    files = [path / f"{name}{suffix}" for suffix in (".cif", ".pdb")]
    structure = next((file for file in files if file.is_file()), None)
    if structure is None:
        raise UserError(f"{path} holds no model {model}: pass --model with one that it holds")
    scores: dict[str, Array] = {}
    for key in ("plddt", "pae", "pde"):
        if (path / f"{key}_{name}.npz").is_file():
            with np.load(path / f"{key}_{name}.npz") as file:
                scores[key] = file[key]
    summary = path / f"confidence_{name}.json"
    if summary.is_file():
        values = json.loads(summary.read_text())
        scores |= {key: np.array([values[key]]) for key in ("ptm", "iptm") if key in values}
    affinity = path / f"affinity_{path.name}.json"
    if affinity.is_file():
        scores["affinity"] = np.array([json.loads(affinity.read_text())["affinity_pred_value"]])
    return Prediction(*_structure(structure), scores)


def _structure(path: Path) -> tuple[list[tuple[str, str, str]], Array]:
    import gemmi

    try:
        structure = gemmi.read_structure(str(path))
        atoms = [
            ((chain.name, str(residue.seqid), atom.name), atom.pos.tolist())
            for chain in structure[0]
            for residue in chain
            for atom in residue
        ]
    except IndexError:
        raise UserError(f"{path} is empty: name a structure that has atoms") from None
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} is no structure that can be read ({error})") from error
    return [key for key, _ in atoms], np.array([at for _, at in atoms]).reshape(-1, 3)


def compare(ours: Prediction, stock: Prediction) -> Comparison:
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
