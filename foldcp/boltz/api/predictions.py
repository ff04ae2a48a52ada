"""A finished prediction as arrays, read from the files that `boltz predict` leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gemmi
import numpy as np
from boltz.data import const
from boltz.data.types import Structure, StructureV2
from numpy.typing import NDArray

from foldcp.errors import UserError

ATOM = np.dtype([
    ("chain", "U8"), ("residue", "i4"), ("residue_name", "U8"), ("name", "U8"), ("element", "U2"),
    ("token", "i4"),
])  # fmt: skip
TOKEN = np.dtype([
    ("chain", "U8"), ("residue", "i4"), ("residue_name", "U8"), ("kind", "U8"), ("atom", "i4"),
    ("atoms", "i4"),
])  # fmt: skip
_KINDS = {"PROTEIN": "protein", "DNA": "dna", "RNA": "rna", "NONPOLYMER": "ligand"}


@dataclass(frozen=True)
class Prediction:
    """The prediction of one input: M samples, the most confident first.

    Args:
        name: name of the input.
        coords: [M, A, 3], float32, angstrom.
        plddt: [M, N], 0 to 1, per token.
        pae: [M, N, N], angstrom, row: the token aligned on.
        pde: [M, N, N], angstrom. Boltz-1 gives pae and pde if asked to (`write_full_pae`,
            `write_full_pde`), else they are None.
        scores: by Boltz's names, each [M]: confidence_score, ptm, iptm, ligand_iptm, protein_iptm,
            complex_plddt, complex_iplddt, complex_pde, complex_ipde.
        pair_chains_iptm: [M, chains, chains], chains in the order in which they occur in `atoms`.
        atoms: [A], with the fields chain, residue (from 1), residue_name, name, element, token.
        tokens: [N], with the fields chain, residue, residue_name, kind (protein, dna, rna or
            ligand), atom (its first one) and atoms (how many it has).
        structures: text of each sample's file, mmCIF or PDB as `output_format` says.
        affinity: by Boltz's names; empty where the input asks for none.
        embeddings: s [1, N, C] and z [1, N, N, C]; empty without `write_embeddings`.
    """

    name: str
    coords: NDArray[np.float32]
    plddt: NDArray[np.float32]
    pae: NDArray[np.float32] | None
    pde: NDArray[np.float32] | None
    scores: dict[str, NDArray[np.float64]]
    pair_chains_iptm: NDArray[np.float64]
    atoms: NDArray[Any] = field(repr=False)
    tokens: NDArray[Any] = field(repr=False)
    structures: tuple[str, ...] = field(repr=False)
    affinity: dict[str, float] = field(default_factory=dict)
    embeddings: dict[str, NDArray[Any]] = field(default_factory=dict, repr=False)

    def save(self, path: str | Path, sample: int = 0) -> None:
        """Write one sample as Boltz wrote it.

        Args:
            path: of the file.
            sample: 0 is the most confident.
        """
        Path(path).write_text(self.structures[sample])


def read(results: Path, name: str, options: Mapping[str, Any]) -> Prediction:
    """Read a prediction with all its samples, and nothing that earlier ones left beside them.

    Args:
        results: folder `boltz_results_*`.
        name: of the input.
        options: of `boltz predict`.

    Raises:
        UserError: the folder does not hold it.
    """
    folder = results / "predictions" / name
    models = [f"{name}_model_{rank}" for rank in range(options["diffusion_samples"])]
    suffix = "cif" if options["output_format"] == "mmcif" else "pdb"
    files = [folder / f"{model}.{suffix}" for model in models]
    if not all(file.is_file() for file in files):
        raise UserError(f"{folder} does not hold all samples of {name}: predict it again")
    structure = results / "processed" / "structures" / f"{name}.npz"
    boltz2 = options["model"] == "boltz2"
    atoms, tokens = _annotations(structure, boltz2)
    samples = [_atoms(file) for file in files]
    summaries = [json.loads((folder / f"confidence_{model}.json").read_text()) for model in models]

    def stack(key: str) -> NDArray[np.float32]:
        return np.stack([np.load(folder / f"{key}_{model}.npz")[key] for model in models])

    affinity, embeddings = folder / f"affinity_{name}.json", folder / f"embeddings_{name}.npz"
    atoms["element"] = samples[0][1]
    return Prediction(
        name=name,
        coords=np.stack([coords for coords, _ in samples]),
        plddt=stack("plddt"),
        pae=stack("pae") if boltz2 or options["write_full_pae"] else None,
        pde=stack("pde") if boltz2 or options["write_full_pde"] else None,
        scores={
            k: np.array([t[k] for t in summaries]) for k, v in summaries[0].items() if _number(v)
        },
        pair_chains_iptm=np.array([_square(t["pair_chains_iptm"]) for t in summaries]),
        atoms=atoms,
        tokens=tokens,
        structures=tuple(file.read_text() for file in files),
        affinity=json.loads(affinity.read_text()) if affinity.exists() else {},
        embeddings=dict(np.load(embeddings)) if options["write_embeddings"] else {},
    )


def _number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _square(pairs: dict[str, dict[str, float]]) -> list[list[float]]:
    order = sorted(pairs, key=int)
    return [[pairs[a][b] for b in order] for a in order]


def _atoms(path: Path) -> tuple[NDArray[np.float32], list[str]]:
    """(coordinates, elements) of a structure's file, in its order."""
    found = gemmi.read_structure(str(path), merge_chain_parts=False)
    atoms = [atom for chain in found[0] for residue in chain for atom in residue]
    coords = np.array([atom.pos.tolist() for atom in atoms], dtype=np.float32)
    return coords.reshape(-1, 3), [atom.element.name for atom in atoms]


def _annotations(path: Path, boltz2: bool) -> tuple[NDArray[Any], NDArray[Any]]:
    """The atoms and tokens of an input that was read."""
    structure = (StructureV2 if boltz2 else Structure).load(path).remove_invalid_chains()
    tokens, atoms = [], []
    for kind, chain, residue in _residues(structure):
        first, count = int(residue["atom_idx"]), int(residue["atom_num"])
        place = str(chain["name"]), int(residue["res_idx"]) + 1, str(residue["name"])
        # Boltz-2 has one token for a modified residue, Boltz-1 one for each of its atoms.
        apart = not residue["is_standard"] and (kind == "ligand" or not boltz2)
        for i in range(count):
            if apart or i == 0:
                tokens.append((*place, kind, first + i, 1 if apart else count))
            name = structure.atoms[first + i]["name"]
            text = str(name) if boltz2 else "".join(chr(c + 32) for c in name if c)
            atoms.append((*place, text, "", len(tokens) - 1))
    return np.array(atoms, dtype=ATOM), np.array(tokens, dtype=TOKEN)


def _residues(structure: Any) -> Iterator[tuple[str, Any, Any]]:
    names = {number: _KINDS[name] for name, number in const.chain_type_ids.items()}
    for chain in structure.chains:
        first = chain["res_idx"]
        for residue in structure.residues[first : first + chain["res_num"]]:
            yield names[int(chain["mol_type"])], chain, residue
