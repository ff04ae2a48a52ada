"""Stock Boltz-1 without its command line: inputs, features and untrained models for parity tests.

What does not depend on the model's generation comes from tests/support/parity.py.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import boltz.main
import torch
from boltz.data.module.inference import PredictionDataset, collate
from boltz.data.types import Manifest, Record
from boltz_inputs import (
    LIGAND,
    OTHER,
    PROTEIN,
    cut_and_extend,
    ligand_atom,
    protein,
    random_a3m,
    random_csv,
)
from pytorch_lightning import seed_everything
from rdkit import Chem
from torch import nn

from bench.synthetic import checkpoint
from bench.synthetic.molecules import write_molecules

SHORT = PROTEIN[:18]


def write_inputs(folder: Path) -> list[Path]:
    """One YAML per case; together they use every feature of Boltz-1.

    Some alignments do not fit their chains: rows and queries are too long or too short.
    """
    a3m = cut_and_extend(random_a3m(folder / "a.a3m", SHORT, 24, 1))
    csv = random_csv(folder / "a.csv", SHORT, [1, 2, 2, 3, -1], 3)
    csv_b = random_csv(folder / "b.csv", OTHER, [2, 3, 1, 9, -1], 4)
    texts = {
        "multimer": [protein("[A, B]", SHORT, csv), protein("C", OTHER[:9], csv_b)],
        "ligand": [
            protein("A", SHORT, a3m),
            f"- ligand: {{id: B, smiles: '{LIGAND}'}}",
            "- ligand: {id: C, ccd: TRP}",
            "constraints:",
            "- pocket: {binder: B, contacts: [[A, 3], [A, 7]]}",
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
        ],
    }
    for name, lines in texts.items():
        (folder / f"{name}.yaml").write_text("\n".join(["version: 1", "sequences:", *lines]))
    return [folder / f"{name}.yaml" for name in texts]


def process(folder: Path) -> Path:
    """Put all inputs through stock's preprocessing for Boltz-1."""
    write_molecules(folder)
    # A residue that Boltz has no token for: serine under a code of its own.
    Chem.SetDefaultPickleProperties(Chem.PropertyPickleOptions.AllProps)
    ccd = pickle.loads((folder / "ccd.pkl").read_bytes())
    ccd["MSR"] = pickle.loads(pickle.dumps(ccd["SER"]))
    (folder / "ccd.pkl").write_bytes(pickle.dumps(ccd))
    boltz.main.process_inputs(
        data=write_inputs(folder),
        out_dir=folder,
        ccd_path=folder / "ccd.pkl",
        mol_dir=folder / "mols",
        msa_server_url="",
        msa_pairing_strategy="greedy",
        boltz2=False,
    )
    return folder


def dataset(folder: str | Path, name: str) -> PredictionDataset:
    """Stock's dataset over the one record called `name` of a folder that `process` filled."""
    done = Path(folder) / "processed"
    return PredictionDataset(
        manifest=Manifest([Record.load(done / "records" / f"{name}.json")]),
        target_dir=done / "structures",
        msa_dir=done / "msa",
        constraints_dir=done / "constraints",
    )


def features(folder: str | Path, name: str, compact: bool, seed: int = 0) -> dict[str, Any]:
    """The collated features of one input, stock's or foldcp's, equal random draws at one seed."""
    from foldcp.boltz.features import boltz1 as boltz1_features

    data = dataset(folder, name)
    if compact:
        boltz1_features.CompactFeaturizer.install(data)
    seed_everything(seed, verbose=False)
    return collate([data[0]])


def build_model(
    imitate_trunk: bool = True,
    dtype: torch.dtype = torch.float64,
    subsample: bool = True,
    steering: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Stock Boltz-1 with untrained weights and the settings `boltz predict` would give it.

    Args:
        imitate_trunk: the confidence module has a trunk of its own, as published.
        dtype: float32 or float64.
        subsample: choose MSA rows at random in every pass.
        steering: changes to Boltz's default steering arguments.

    Returns:
        A `Boltz1` in eval mode on the CPU.
    """
    arguments = checkpoint.hyperparameters("tiny", "boltz1")
    pairformer = asdict(boltz.main.PairformerArgs(num_blocks=2))
    msa = boltz.main.MSAModuleArgs(
        msa_blocks=1, subsample_msa=subsample, num_subsampled_msa=12, use_paired_feature=False
    )
    arguments |= dict(
        pairformer_args=pairformer,
        msa_args=asdict(msa),
        diffusion_process_args=asdict(boltz.main.BoltzDiffusionParams()),
        steering_args=asdict(boltz.main.BoltzSteeringParams()) | dict(steering or {}),
        confidence_imitate_trunk=imitate_trunk,
        ema=False,
        use_kernels=False,
    )
    if not imitate_trunk:
        arguments["confidence_model_args"]["pairformer_args"] = pairformer
    return checkpoint.build_model(arguments, "boltz1").to(dtype).requires_grad_(False)
