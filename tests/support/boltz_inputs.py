"""Small Boltz-2 inputs that together use every kind of feature, through stock's preprocessing."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
from boltz.data import const
from boltz.data.module.inferencev2 import PredictionDataset
from boltz.data.types import Manifest, Record
from boltz.main import process_inputs
from rdkit import Chem
from rdkit.Chem import AllChem

PROTEIN = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ"
OTHER = "GSHMCEAAWYPLTDRV"
LIGAND = "C[C@H](N)C(=O)OC/C=C/c1ccccc1"
LONG = 1200


def protein(id: str, sequence: str, msa: str | Path = "empty", more: str = "") -> str:
    return f"- protein: {{id: {id}, sequence: {sequence}, msa: {msa}{more}}}"


def random_a3m(path: Path, query: str, depth: int, seed: int) -> Path:
    """An alignment with gaps and insertions, in the query row too (stock drops others' counts)."""
    random = np.random.default_rng(seed)
    rows = [query[:5] + "acd" + query[5:9] + "k" + query[9:]]
    for _ in range(depth - 1):
        letters = random.choice(list("ACDEFGHIKLMNPQRSTVWY-X"), size=len(query)).tolist()
        letters[3] += "gg" * int(random.integers(0, 2))
        rows.append("".join(letters))
    path.write_text("".join(f">{i}\n{row}\n" for i, row in enumerate(rows)))
    return path


def cut_and_extend(path: Path) -> Path:
    """Cut a row of an a3m file short and make one longer, neither of them the last."""
    lines = path.read_text().splitlines()
    lines[5], lines[9] = lines[5][:4], f"{lines[9]}MKa-T"
    path.write_text("\n".join(lines) + "\n")
    return path


def random_csv(path: Path, query: str, keys: list[int], seed: int) -> Path:
    random = np.random.default_rng(seed)
    lines = ["key,sequence", f"0,{query}"]
    for key in keys:
        row = "".join(random.choice(list("ACDEFGHIKLMNPQRSTVWY-"), size=len(query)))
        lines.append(f"{'' if key < 0 else key},{row}")
    path.write_text("\n".join(lines) + "\n")
    return path


def write_template(path: Path, sequence: str) -> Path:
    """A PDB file of a peptide: flat coordinates from RDKit, lifted out of the plane."""
    mol = Chem.MolFromSequence(sequence)
    AllChem.Compute2DCoords(mol)
    conformer = mol.GetConformer()
    for i in range(mol.GetNumAtoms()):
        x, y, _ = conformer.GetAtomPosition(i)
        conformer.SetAtomPosition(i, (x, y, float(np.sin(i))))
    names = [const.prot_letter_to_token[letter] for letter in sequence]
    lines = [
        f"SEQRES {row + 1:3d} A {len(names):4d}  {' '.join(names[13 * row : 13 * row + 13])}"
        for row in range((len(names) + 12) // 13)
    ]
    path.write_text("\n".join(lines) + "\n" + Chem.MolToPDBBlock(mol))
    return path


def ligand_atom(smiles: str, position: int) -> str:
    """The name that Boltz gives an atom of a SMILES ligand: element and canonical rank."""
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    rank = AllChem.CanonicalRankAtoms(mol)[position] + 1
    return f"{mol.GetAtomWithIdx(position).GetSymbol().upper()}{rank}"


def write_inputs(folder: Path) -> list[Path]:
    """One YAML per case; every sparse feature has at least one non-trivial case."""
    a3m = random_a3m(folder / "a.a3m", PROTEIN, 64, 1)
    a3m_b = random_a3m(folder / "b.a3m", OTHER, 23, 2)
    csv = random_csv(folder / "a.csv", PROTEIN, [1, 2, 2, 3, 5, -1, -1], 3)
    csv_b = random_csv(folder / "b.csv", OTHER, [2, 3, 1, 1, 9, -1], 4)
    uneven = cut_and_extend(random_a3m(folder / "u.a3m", PROTEIN, 9, 5))
    pdb = write_template(folder / "t.pdb", OTHER)
    atom = ligand_atom(LIGAND, 3)
    texts = {
        "monomer": [protein("A", PROTEIN)],
        "alignments": [protein("A", PROTEIN, a3m), protein("B", OTHER, a3m_b)],
        "unfit": [protein("A", PROTEIN, uneven), protein("B", PROTEIN[:9], a3m_b)],
        "paired": [protein("[A, B]", PROTEIN, csv), protein("C", OTHER, csv_b)],
        "ligand": [
            protein("A", PROTEIN),
            protein("C", OTHER),
            f"- ligand: {{id: B, smiles: '{LIGAND}'}}",
            "constraints:",
            "- pocket: {binder: B, contacts: [[A, 3], [A, 7], [C, 2]], max_distance: 5.5}",
            f"- pocket: {{binder: A, contacts: [[A, 9], [C, 2], [B, {atom}]], force: true}}",
            f"- contact: {{token1: [A, 3], token2: [B, {atom}], max_distance: 7.25}}",
            "- contact: {token1: [A, 30], token2: [C, 4], max_distance: 4, force: true}",
            "- contact: {token1: [C, 2], token2: [A, 1], max_distance: 9}",
        ],
        "nucleic": [
            "- rna: {id: A, sequence: GGCAUUCC}",
            "- dna: {id: [B, C], sequence: GATTACAG}",
            "- ligand: {id: D, ccd: MG}",
        ],
        "modified": [
            protein("A", OTHER, more=", modifications: [{position: 2, ccd: MSR}]"),
            protein("B", PROTEIN[:12], more=", cyclic: true"),
            "- ligand: {id: D, smiles: 'CCO'}",
            "constraints:",
            f"- bond: {{atom1: [A, 5, SG], atom2: [D, 1, {ligand_atom('CCO', 0)}]}}",
            "- bond: {atom1: [A, 1, N], atom2: [A, 16, C]}",
        ],
        "template": [
            protein("A", OTHER),
            protein("B", PROTEIN),
            "templates:",
            f"- {{pdb: {pdb}, chain_id: A, force: true, threshold: 3.5}}",
        ],
        "short": [protein("A", (PROTEIN * 20)[: LONG // 2])],
        "long": [protein("A", (PROTEIN * 40)[:LONG])],
    }
    for name, lines in texts.items():
        (folder / f"{name}.yaml").write_text("\n".join(["version: 1", "sequences:", *lines]))
    return [folder / f"{name}.yaml" for name in texts]


def process(folder: Path) -> Path:
    """Put all inputs through stock's preprocessing, in a folder that holds Boltz's `mols`."""
    mol_dir = folder / "mols"
    # A residue that Boltz has no token for: serine under a code of its own.
    Chem.SetDefaultPickleProperties(Chem.PropertyPickleOptions.AllProps)
    serine = pickle.loads((mol_dir / "SER.pkl").read_bytes())
    (mol_dir / "MSR.pkl").write_bytes(pickle.dumps(serine))
    process_inputs(
        data=write_inputs(folder),
        out_dir=folder,
        ccd_path=folder / "ccd.pkl",
        mol_dir=mol_dir,
        msa_server_url="",
        msa_pairing_strategy="greedy",
        boltz2=True,
    )
    return folder


def dataset(folder: Path, name: str, affinity: bool = False) -> PredictionDataset:
    """Stock's dataset over the one record called `name` of a folder that `process` filled."""
    done = folder / "processed"
    return PredictionDataset(
        manifest=Manifest([Record.load(done / "records" / f"{name}.json")]),
        target_dir=done / "structures",
        msa_dir=done / "msa",
        mol_dir=folder / "mols",
        constraints_dir=done / "constraints",
        template_dir=done / "templates",
        extra_mols_dir=done / "mols",
        affinity=affinity,
    )
