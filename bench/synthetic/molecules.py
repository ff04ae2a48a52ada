"""Molecules of a Boltz cache, made from RDKit alone.

Boltz reads one pickled RDKit molecule per component code (`mols/<code>.pkl`; Boltz-1: one dict in
`ccd.pkl`). It needs the property `name` on every atom, `leaving_atom` on residues that form bonds,
and one conformer. RDKit's sequence reader names the atoms of the standard residues as the PDB does.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Collection, Iterable
from pathlib import Path

from rdkit import Chem
from rdkit.Chem import AllChem

AMINO_ACIDS = dict(
    ALA="A", ARG="R", ASN="N", ASP="D", CYS="C", GLN="Q", GLU="E", GLY="G", HIS="H", ILE="I",
    LEU="L", LYS="K", MET="M", PHE="F", PRO="P", SER="S", THR="T", TRP="W", TYR="Y", VAL="V",
)  # fmt: skip
RNA, DNA = 3, 7  # RDKit's "flavor" of a sequence: RNA or DNA, with the 5' phosphate
NUCLEOTIDES = dict(
    A=("A", RNA), G=("G", RNA), C=("C", RNA), U=("U", RNA),
    DA=("A", DNA), DG=("G", DNA), DC=("C", DNA), DT=("T", DNA),
)  # fmt: skip
# An unknown nucleotide is the backbone and the sugar alone.
SUGAR_PHOSPHATE = frozenset(
    ("P", "OP1", "OP2", "O5'", "C5'", "C4'", "O4'", "C3'", "O3'", "C2'", "O2'", "C1'")
)
LEAVING_ATOMS = frozenset({"OXT", "HXT", "OP3"})
EMBEDDING_SEED = 7


def write_molecules(cache: str | Path, ccd: Iterable[str] = ()) -> list[str]:
    """Write `mols/*.pkl`, `ccd.pkl` and an empty `mols.tar` (which keeps Boltz from downloading).

    Args:
        cache: folder that `boltz predict --cache` will be given; made if absent.
        ccd: further component codes (for example "SEP"), read from the copy of the Chemical
            Component Dictionary inside the optional package biotite.
    Returns:
        The codes written.
    Raises:
        ModuleNotFoundError: `ccd` is given and biotite is not installed.
    """
    # The default pickles drop properties, and with them the atom names.
    Chem.SetDefaultPickleProperties(Chem.PropertyPickleOptions.AllProps)
    molecules = standard_molecules() | {code: component(code) for code in ccd}
    folder = Path(cache) / "mols"
    folder.mkdir(parents=True, exist_ok=True)
    for code, molecule in molecules.items():
        write_bytes(folder / f"{code}.pkl", pickle.dumps(molecule))
    write_bytes(Path(cache) / "ccd.pkl", pickle.dumps(molecules))
    write_bytes(Path(cache) / "mols.tar", b"")
    return list(molecules)


def standard_molecules() -> dict[str, Chem.Mol]:
    """Build the 20 amino acids, UNK, the 8 nucleotides, N, DN and MG, keyed by component code."""
    molecules = {code: _named(Chem.MolFromSequence(s)) for code, s in AMINO_ACIDS.items()}
    molecules["UNK"] = _named(Chem.MolFromSequence("A"))  # the atoms of alanine
    for code, (letter, flavor) in NUCLEOTIDES.items():
        molecules[code] = _named(Chem.MolFromSequence(letter, flavor=flavor))
    for code, flavor in (("N", RNA), ("DN", DNA)):
        whole = Chem.MolFromSequence("A", flavor=flavor)
        molecules[code] = _named(_keep_atoms(whole, SUGAR_PHOSPHATE))
    molecules["MG"] = _ion("[Mg+2]", "MG")
    return molecules


def component(code: str) -> Chem.Mol:
    """Build any component of the Chemical Component Dictionary with its ideal coordinates.

    Args:
        code: component code such as "SEP" or "NAG".
    Returns:
        Heavy atoms with names, leaving flags and one conformer in angstrom.
    Raises:
        ModuleNotFoundError: the optional package biotite is not installed.
    """
    try:
        from biotite.interface import rdkit as bridge
        from biotite.structure import info
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"component {code!r} is not one of the built-in molecules and biotite, which carries "
            "the Chemical Component Dictionary, is not installed: pip install 'biotite>=1.6'"
        ) from error
    residue = info.residue(code, allow_missing_coord=True)
    molecule = bridge.to_mol(residue)
    for atom, name in zip(molecule.GetAtoms(), residue.atom_name, strict=True):
        _label(atom, str(name))
    Chem.SanitizeMol(molecule)
    molecule = Chem.RemoveHs(molecule)
    Chem.AssignStereochemistryFrom3D(molecule)
    molecule.GetConformer(0).SetProp("name", "Ideal")
    return molecule


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees all of it or none of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(data)
    partial.replace(path)


def _named(molecule: Chem.Mol) -> Chem.Mol:
    """Label the atoms of a molecule read from a sequence and give it a conformer."""
    for atom in molecule.GetAtoms():
        _label(atom, _pdb_name(atom))
    with_hydrogens = Chem.AddHs(molecule)
    if AllChem.EmbedMolecule(with_hydrogens, randomSeed=EMBEDDING_SEED) != 0:
        raise RuntimeError(f"RDKit found no conformer for {Chem.MolToSmiles(molecule)}")
    molecule = Chem.RemoveHs(with_hydrogens)
    Chem.AssignStereochemistry(molecule, cleanIt=True, force=True)  # the CIP labels
    conformer = molecule.GetConformer(0)
    conformer.SetProp("name", "Computed")
    conformer.SetProp("coord_generation", "ETKDGv2")
    return molecule


def _ion(smiles: str, name: str) -> Chem.Mol:
    molecule = Chem.MolFromSmiles(smiles)
    _label(molecule.GetAtomWithIdx(0), name)
    molecule.AddConformer(Chem.Conformer(1), assignId=True)
    molecule.GetConformer(0).SetProp("name", "Computed")
    return molecule


def _keep_atoms(molecule: Chem.Mol, names: Collection[str]) -> Chem.Mol:
    editable = Chem.RWMol(molecule)
    dropped = [atom.GetIdx() for atom in molecule.GetAtoms() if _pdb_name(atom) not in names]
    for index in reversed(dropped):  # removing an atom renumbers those behind it
        editable.RemoveAtom(index)
    kept = editable.GetMol()
    Chem.SanitizeMol(kept)
    return kept


def _label(atom: Chem.Atom, name: str) -> None:
    atom.SetProp("name", name)
    atom.SetProp("leaving_atom", "1" if name in LEAVING_ATOMS else "0")


def _pdb_name(atom: Chem.Atom) -> str:
    return atom.GetPDBResidueInfo().GetName().strip()
