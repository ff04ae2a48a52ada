"""Inputs for `boltz predict` that together hold everything an input file can ask for."""

from __future__ import annotations

import pickle
from pathlib import Path

import gemmi
from boltz_inputs import cut_and_extend, ligand_atom, random_a3m, random_csv, write_template
from rdkit import Chem

from bench.synthetic import FILE_NAMES

A, B = "MKTAYIAKQRQISF", "GSHMCEAAWYPLTDRV"
SMILES = "CC(N)C(=O)OC"


def make_cache(folder: Path, tiny: Path) -> Path:
    """A copy of a cache with one residue more: serine under a code that Boltz has no token for."""
    folder.mkdir()
    for name in [*FILE_NAMES.values(), "mols.tar"]:
        (folder / name).symlink_to(tiny / name)
    (folder / "mols").mkdir()
    for path in (tiny / "mols").iterdir():
        (folder / "mols" / path.name).symlink_to(path)
    Chem.SetDefaultPickleProperties(Chem.PropertyPickleOptions.AllProps)
    serine = pickle.loads((tiny / "mols" / "SER.pkl").read_bytes())
    (folder / "mols" / "MSR.pkl").write_bytes(pickle.dumps(serine))
    ccd = pickle.loads((tiny / "ccd.pkl").read_bytes())
    ccd["MSR"] = serine
    (folder / "ccd.pkl").write_bytes(pickle.dumps(ccd))
    return folder


def chain(kind: str, id: str, text: str, more: str = "") -> str:
    return f"- {kind}: {{id: {id}, {text}{more}}}"


def protein(id: str, sequence: str, msa: str | Path = "empty", more: str = "") -> str:
    return chain("protein", id, f"sequence: {sequence}, msa: {msa}", more)


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(["version: 1", "sequences:", *lines]) + "\n")
    return path


def write_all(folder: Path, files: Path) -> Path:
    """A folder of inputs.

    Args:
        folder: made, for the inputs.
        files: made, for what they refer to.

    Returns:
        `folder`.
    """
    folder.mkdir()
    files.mkdir()
    csv = random_csv(files / "a.csv", A, [1, 2, 2, 3, 5, -1, -1], 3)
    csv_b = random_csv(files / "b.csv", B, [2, 3, 1, 1, 9, -1], 4)
    # Rows that are shorter and longer than the chain, and a query that is none of its chain.
    a3m = cut_and_extend(random_a3m(files / "a.a3m", A, 9, 1))
    a3m_b = random_a3m(files / "b.a3m", B, 5, 2)
    cif = write_cif(files / "template one.cif", B)
    pdb = write_template(files / "other.pdb", A)
    write(folder / "chains.yaml", protein("[A, B]", A, csv), protein("C", B, csv_b))
    (folder / "record.fasta").write_text(
        f">A|protein|{a3m}\n{A}\n>B|protein|{a3m_b}\n{B[:9]}\n>R|rna\nGGCAU\n>D|dna\nGATT\n"
        f">L|smiles\n{SMILES}\n>T|ccd\nTRP\n>I|ccd\nMG\n"
    )
    write(
        folder / "bonded.yml",
        protein("A", B, more=", modifications: [{position: 2, ccd: MSR}]"),
        protein("B", A[:10], more=", cyclic: true"),
        chain("ligand", "D", "smiles: 'CCO'"),
        chain("rna", "R", "sequence: GGCA", ", cyclic: true"),
        "constraints:",
        f"- bond: {{atom1: [A, 5, SG], atom2: [D, 1, {ligand_atom('CCO', 0)}]}}",
        "- bond: {atom1: [A, 1, N], atom2: [A, 16, C]}",
    )
    write(
        folder / "held.yaml",
        protein("A", A),
        protein("C", B),
        chain("ligand", "[B, E]", f"smiles: '{SMILES}'"),
        "constraints:",
        "- pocket: {binder: B, contacts: [[A, 3], [A, 7], [C, 2]], max_distance: 5.5}",
        f"- contact: {{token1: [A, 3], token2: [B, {ligand_atom(SMILES, 1)}], max_distance: 7.25}}",
        "- contact: {token1: [C, 2], token2: [A, 1], max_distance: 9}",
    )
    write(
        folder / "templates.yaml",
        protein("[A, B]", B),
        protein("C", A),
        "templates:",
        f"- {{cif: '{cif}', chain_id: [A, B], force: true, threshold: 3.5}}",
        f"- {{pdb: {pdb}, chain_id: C, template_id: A1}}",
    )
    write(
        folder / "binder.yaml",
        protein("A", A, a3m),
        chain("ligand", "L", f"smiles: '{SMILES}'"),
        "properties:",
        "- affinity: {binder: L}",
    )
    return folder


def write_cif(path: Path, sequence: str) -> Path:
    """The peptide of `write_template` as mmCIF."""
    pdb = write_template(path.with_suffix(".pdb"), sequence)
    structure = gemmi.read_structure(str(pdb))
    structure.setup_entities()
    structure.assign_label_seq_id()
    structure.make_mmcif_document().write_file(str(path))
    pdb.unlink()
    return path
