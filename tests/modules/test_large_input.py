"""Every rank of a 4x4 mesh gets its part of a 10,000-token input: samples against slow loops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from boltz.data.module.inferencev2 import PredictionDataset, collate
from boltz.data.types import StructureV2
from boltz.main import process_inputs
from boltz.model.modules.encodersv2 import RelativePositionEncoder as StockRelPos
from boltz.model.modules.trunkv2 import ContactConditioning
from boltz_inputs import LIGAND, dataset, protein, random_a3m
from compact import randomise
from torch import Tensor, nn

from bench.synthetic.molecules import AMINO_ACIDS, write_molecules
from foldcp.boltz.families import boltz2_options
from foldcp.boltz.features import boltz2 as features
from foldcp.fabric.mesh import Mesh
from foldcp.fabric.ranks import Ranks
from foldcp.layout.tiles import WINDOW, AtomLayout, PairLayout
from foldcp.modules.trunk.pair_embedding import (
    ContactOptions,
    PairEmbedding,
    RelativePositionEncoder,
)
from foldcp.runtime.screen.stages import peak_host_bytes

TOKENS, ROWS, COLS, C = 10_000, 4, 4, 6
LIGAND_ATOMS = 15
# (kind, residues) of each chain: two copies of a protein, another one, RNA and a ligand.
CHAINS = (
    ("twin", 3001), ("twin", 3001), ("protein", 2477), ("rna", 1506), ("ligand", LIGAND_ATOMS)
)  # fmt: skip
CONTACT = (("A", 5), ("C", 2400), 7.25)
R_MAX, S_MAX = 32, 2
CUTOFFS = ContactOptions(4.0, 20.0)


@dataclass(frozen=True)
class Large:
    """The input as foldcp has it, as stock parsed it, and what a loop over its chains says."""

    feats: dict[str, Any]
    structure: StructureV2
    tokens: list[tuple[int, int, int, int]]  # chain, entity, copy, residue


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Large:
    folder = tmp_path_factory.mktemp("large")
    write_molecules(folder)
    letters = "".join(sorted(AMINO_ACIDS.values()))
    sequences = {
        kind: "".join(("GCAU" if kind == "rna" else letters)[i * i % 4 + i % 3 * (kind != "rna")]
                      for i in range(n))
        for kind, n in CHAINS
    }  # fmt: skip
    a3m = random_a3m(folder / "c.a3m", sequences["protein"], 12, 1)
    (end, place), (other, its), limit = CONTACT
    lines = [
        protein("[A, B]", sequences["twin"]),
        protein("C", sequences["protein"], a3m),
        f"- rna: {{id: D, sequence: {sequences['rna']}}}",
        f"- ligand: {{id: E, smiles: '{LIGAND}'}}",
        "constraints:",
        f"- contact: {{token1: [{end}, {place}], token2: [{other}, {its}], max_distance: {limit}}}",
    ]
    path = folder / "large.yaml"
    path.write_text("\n".join(["version: 1", "sequences:", *lines]))
    held = peak_host_bytes()
    process_inputs(
        data=[path], out_dir=folder, ccd_path=folder / "ccd.pkl", mol_dir=folder / "mols",
        msa_server_url="", msa_pairing_strategy="greedy", boltz2=True,
    )  # fmt: skip
    source: PredictionDataset = dataset(folder, "large")
    features.CompactFeaturizer.install(source)
    entities = sorted({kind for kind, _ in CHAINS}, key=[kind for kind, _ in CHAINS].index)
    tokens = []
    for chain, (kind, residues) in enumerate(CHAINS):
        copy = sum(other == kind for other, _ in CHAINS[:chain])
        places = [0] * residues if kind == "ligand" else range(residues)
        tokens += [(chain, entities.index(kind), copy, place) for place in places]
    structure = StructureV2.load(folder / "processed" / "structures" / "large.npz")
    feats = collate([source[0]])
    # Each of stock's pair features would take 8 bytes of a pair or more.
    assert peak_host_bytes() - held < 5 * TOKENS**2
    feats["contact_threshold_value"] = feats["contact_threshold_value"].double()
    return Large(feats, structure, tokens)


def _stock() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "rel_pos": randomise(StockRelPos(C, R_MAX, S_MAX)),
        "token_bonds": randomise(nn.Linear(1, C, bias=False), 1),
        "token_bonds_type": randomise(nn.Embedding(7, C), 2),
        "contact_conditioning": randomise(ContactConditioning(C, 4.0, 20.0), 3),
    }


def _position(weight: Tensor, large: Large, i: int, j: int) -> Tensor:
    """AlphaFold 3, Algorithm 3, of one pair, with the chain offset as Boltz-2 counts it."""
    (chain, entity, copy, place), (other, its, turn, where) = large.tokens[i], large.tokens[j]
    far, width = 2 * R_MAX + 1, 2 * R_MAX + 2
    residue = token = far
    if chain == other:
        residue = min(max(place - where + R_MAX, 0), 2 * R_MAX)
        if place == where:
            token = min(max(i - j + R_MAX, 0), 2 * R_MAX)
    copies = 2 * S_MAX + 1 if chain == other else min(max(copy - turn + S_MAX, 0), 2 * S_MAX)
    found = weight[:, residue] + weight[:, width + token] + weight[:, 2 * width + 1 + copies]
    return found + weight[:, 2 * width] if entity == its else found


def _bonds(large: Large) -> dict[tuple[int, int], int]:
    """Types of the ligand's bonds, by token: one for each of its atoms, which come last."""
    first = len(large.structure.atoms) - LIGAND_ATOMS
    found = {}
    for bond in large.structure.bonds:
        a, b = (int(bond[x]) - first + TOKENS - LIGAND_ATOMS for x in ("atom_1", "atom_2"))
        found[a, b] = found[b, a] = int(bond["type"]) + 1  # 0 is no bond
    return found


def _contact(stock: nn.Module, i: int, j: int) -> Tensor:
    """Stock's embedding of one pair."""
    starts = {"A": 0, "B": 3001, "C": 6002}
    (end, place), (other, its), limit = CONTACT
    pair = starts[end] + place - 1, starts[other] + its - 1
    kind = 4 if (i, j) in (pair, pair[::-1]) else 1  # 4 is a contact, 1 a pair without one
    one_hot = torch.eye(5, dtype=torch.float64)[kind].reshape(1, 1, 1, 5)
    threshold = torch.full((1, 1, 1), limit if kind == 4 else 0.0, dtype=torch.float64)
    given = {"contact_conditioning": one_hot, "contact_threshold": threshold}
    return stock(given)[0, 0, 0]


def _samples(layout: PairLayout) -> tuple[list[int], list[int]]:
    """Rows and columns of a tile: its edges, borders of chains, and some in between."""
    borders = [sum(n for _, n in CHAINS[: i + 1]) for i in range(len(CHAINS))]
    special = [x for b in borders for x in (b - 1, b)] + [4, 6002 + 2399, *range(9985, TOKENS)]

    def within(span: tuple[int, int], step: int) -> list[int]:
        lo, hi = span[0], min(span[1], TOKENS)
        wanted = {x for x in special if lo <= x < hi} | set(range(lo, hi, step)) | {hi - 1}
        return sorted(wanted)

    return within(layout.row_span(), 400), within(layout.col_span(), 90)


@pytest.mark.parametrize("rank", range(ROWS * COLS))
def test_pairs_of_a_tile(large: Large, rank: int) -> None:
    assert len(large.tokens) == TOKENS == large.feats["asym_id"].shape[1]
    stock, bonds = _stock(), _bonds(large)
    layout, mesh = PairLayout(TOKENS, ROWS, COLS, rank), Mesh(ROWS, COLS, Ranks(rank, ROWS * COLS))
    options = boltz2_options.relative_position(stock["rel_pos"])
    tiled = {**stock, "rel_pos": RelativePositionEncoder(stock["rel_pos"], mesh, options)}
    embedding, weight = (
        PairEmbedding(**tiled, contacts=CUTOFFS),
        stock["rel_pos"].linear_layer.weight,
    )
    (r0, _), (c0, _) = layout.tile_box()
    rows, cols = _samples(layout)
    special = 0
    for i in rows:
        out = torch.zeros(1, 1, layout.tile_cols, C, dtype=torch.float64)
        embedding.add_rows_(out, large.feats, layout, i - r0, i - r0 + 1)
        for j in cols:
            expected = _position(weight, large, i, j)
            expected = expected + _contact(stock["contact_conditioning"], i, j)
            kind = bonds.get((i, j))
            expected = expected + stock["token_bonds_type"].weight[kind or 0]
            if kind is not None:
                special += 1
                expected = expected + stock["token_bonds"].weight[:, 0]
            assert torch.allclose(out[0, 0, j - c0], expected, rtol=1e-10, atol=1e-10), (i, j)
    assert special == (len(bonds) if rank == ROWS * COLS - 1 else 0)


@pytest.mark.parametrize("rank", range(ROWS * COLS))
def test_atoms_of_a_rank(large: Large, rank: int) -> None:
    atoms = large.structure.atoms
    of_atom = {}
    token = 0
    for chain, (kind, _) in zip(large.structure.chains, CHAINS, strict=True):
        first = chain["res_idx"]
        for residue in large.structure.residues[first : first + chain["res_num"]]:
            for a in range(residue["atom_num"]):
                of_atom[int(residue["atom_idx"]) + a] = token + (a if kind == "ligand" else 0)
            token += residue["atom_num"] if kind == "ligand" else 1
    assert token == TOKENS
    windows = large.feats["atom_pad_mask"].shape[1] // WINDOW
    layout = AtomLayout(windows, ROWS * COLS, rank)
    lo, hi = layout.own_span()
    assert 0 < hi - lo <= -(-windows // (ROWS * COLS)) * WINDOW
    assert lo == (layout.own_span(rank - 1)[1] if rank else 0)
    assert hi == windows * WINDOW or rank < ROWS * COLS - 1
    for atom in {lo, hi - 1, *range(lo, hi, 977)}:
        real = bool(large.feats["atom_pad_mask"][0, atom])
        assert real == (atom < len(atoms)), atom
        if real:
            assert int(large.feats["atom_to_token"][0, atom]) == of_atom[atom], atom
