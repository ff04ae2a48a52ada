"""Read predictions in results folders of Boltz, and structures."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foldcp.errors import UserError

STRUCTURES = (".cif", ".pdb", ".mmcif", ".ent")
Array = NDArray[Any]
_STANDARD = frozenset(  # residues of one token
    "ALA ARG ASN ASP CYS GLN GLU GLY HIS ILE LEU LYS MET PHE PRO SER THR TRP TYR VAL UNK "  # noqa: SIM905
    "A C G U N DA DC DG DT DN".split()
)


@dataclass(frozen=True)
class Structure:
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
        found = {x.name: x for x in sorted(folder.glob("*")) if structure_of(x)}
        if found:
            return found
    if structure_of(path):
        return {path.name: path}
    why = "holds no prediction" if path.exists() else "does not exist"
    if len(inside) > 2:
        why = f"holds several folders ({', '.join(x.parent.name for x in inside[1:])})"
    raise UserError(
        f"{path} {why}: name a folder boltz_results_..., the folder of one prediction in it, or a "
        f"structure ({', '.join(STRUCTURES)})"
    )


def read(path: Path, model: int = 0) -> Structure:
    """Read a prediction.

    Args:
        path: of `find`.
        model: rank of the sample by confidence.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    if path.is_file():
        return Structure(*_structure(path))
    name, structure = f"{path.name}_model_{model}", structure_of(path, model)
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
    return Structure(*_structure(structure), scores)


@dataclass(frozen=True)
class Chain:
    """One chain of a structure.

    Args:
        name: of the chain.
        kind: "polymer", "ligand" or "mixed".
        tokens: as Boltz cuts it: one for a standard residue of a polymer, else one for an atom.
    """

    name: str
    kind: str
    tokens: int


def chains(path: Path) -> list[Chain]:
    """Read the chains of a structure, in the order of its file.

    Args:
        path: of the structure.

    Raises:
        UserError: the file cannot be read.
    """
    found = []
    for chain in _model(path):
        standard = [r.het_flag != "H" and r.name in _STANDARD for r in chain]
        tokens = sum(1 if one else len(r) for one, r in zip(standard, chain, strict=True))
        kind = "polymer" if all(standard) else "mixed" if any(standard) else "ligand"
        found.append(Chain(chain.name, kind, tokens))
    return found


def structure_of(folder: Path, model: int = 0) -> Path | None:
    """Return the structure of a prediction, None where there is none.

    Args:
        folder: of the prediction.
        model: rank of the sample by confidence.
    """
    name = f"{folder.name}_model_{model}"
    files = [folder / f"{name}{suffix}" for suffix in (".cif", ".pdb")]
    return next((file for file in files if file.is_file()), None)


def _structure(path: Path) -> tuple[list[tuple[str, str, str]], Array]:
    atoms = [
        ((chain.name, str(residue.seqid), atom.name), atom.pos.tolist())
        for chain in _model(path)
        for residue in chain
        for atom in residue
    ]
    return [key for key, _ in atoms], np.array([at for _, at in atoms]).reshape(-1, 3)


def _model(path: Path) -> Any:
    """Read the first model of a structure."""
    import gemmi

    try:
        return gemmi.read_structure(str(path))[0]
    except IndexError:
        raise UserError(f"{path} is empty: name a structure that has atoms") from None
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a structure ({error})") from error
