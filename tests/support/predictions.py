"""Small results folders of Boltz: a structure of two chains, and what its confidence files say."""

from __future__ import annotations

import json
from pathlib import Path

import gemmi
import numpy as np

COORDS = np.random.default_rng(5).normal(size=(40, 3)) * 8


def write(path: Path, coords: np.ndarray) -> Path:
    """A structure of two chains, four atoms a residue."""
    structure = gemmi.Structure()
    structure.add_model(gemmi.Model("1"))
    for i, at in enumerate(coords):
        name = "A" if i < 20 else "B"
        chain = structure[0].find_chain(name) or structure[0].add_chain(gemmi.Chain(name))
        if i % 4 == 0:
            residue = gemmi.Residue()
            residue.name, residue.seqid = "ALA", gemmi.SeqId(str(i // 4 + 1))
            chain.add_residue(residue)
        atom = gemmi.Atom()
        atom.name, atom.pos = ("N", "CA", "C", "O")[i % 4], gemmi.Position(*at)
        atom.element = gemmi.Element("C")
        chain[-1].add_atom(atom)
    structure.setup_entities()
    if path.suffix == ".pdb":
        structure.write_pdb(str(path))
    else:
        structure.make_mmcif_document().write_file(str(path))
    return path


def results(folder: Path, coords: np.ndarray, name: str = "one", off: float = 0.0) -> Path:
    at = folder / "boltz_results_x" / "predictions" / name
    at.mkdir(parents=True)
    write(at / f"{name}_model_0.cif", coords)
    np.savez(at / f"plddt_{name}_model_0.npz", plddt=np.full(10, 0.7))
    np.savez(at / f"pae_{name}_model_0.npz", pae=np.full((10, 10), 3.0 + off))
    (at / f"confidence_{name}_model_0.json").write_text(json.dumps({"ptm": 0.5, "iptm": 0.25}))
    return folder / "boltz_results_x"
