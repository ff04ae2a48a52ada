"""Compact features equal stock Boltz-2's, draw for draw, and nothing square is ever allocated."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from boltz.data import const
from boltz.data.feature import featurizerv2 as stock
from boltz.data.module.inferencev2 import PredictionDataset, collate
from boltz.data.types import MSA, MSADeletion, MSAResidue, MSASequence
from boltz_inputs import LONG, OTHER, dataset, process
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.synthetic.molecules import write_molecules
from foldcp.boltz.features import boltz2 as features
from foldcp.boltz.features import stock as rebound
from foldcp.boltz.features.dense import dense_view

# Host bytes a token per stage, above what was measured at LONG tokens; one bool for every token
# pair would add 1,200.
BYTES_PER_TOKEN = {
    "token_features": 1e3,
    "bond_features": 1e3,
    "contact_features": 1e3,
    "atom_features": 4e3,
    "msa_features": 1e3,
    "template_features": 1e3,
}
# Stock's features that only training, validation or affinity reads.
TRAINING_ONLY = {
    "atom_resolved_mask",
    "bfactor",
    "coords",
    "disto_center",
    "disto_coords_ensemble",
    "disto_target",
    "ensemble_ref_idxs",
    "frame_resolved_mask",
    "plddt",
    "r_set_to_rep_atom",
    "ref_chirality",
    "token_disto_mask",
    "token_resolved_mask",
    "token_to_center_atom",
}
INDEX_DTYPES = {
    "msa": torch.uint8,
    "msa_paired": torch.bool,
    "has_deletion": torch.bool,
    "msa_mask": torch.bool,
    "atom_to_token": torch.int64,
    "token_to_rep_atom": torch.int64,
    "contact_threshold_value": torch.float32,
}
CASES = (
    "monomer",
    "alignments",
    "unfit",
    "paired",
    "ligand",
    "nucleic",
    "modified",
    "template",
)


@pytest.fixture(scope="module")
def processed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds every input after stock's preprocessing."""
    folder = tmp_path_factory.mktemp("features")
    write_molecules(folder)
    return process(folder)


class Recorder:
    """Hands `process` on and keeps what it was called with."""

    def __init__(self, featurizer: stock.Boltz2Featurizer) -> None:
        self.featurizer = featurizer

    def process(self, data: Any, **options: Any) -> dict[str, torch.Tensor]:
        self.data, self.options = data, options
        return self.featurizer.process(data, **options)


def featurise(source: PredictionDataset) -> tuple[dict[str, Any], Recorder, torch.Tensor]:
    """Collated features, the recorder, and torch's generator state afterwards."""
    source.featurizer = recorder = Recorder(source.featurizer)
    torch.manual_seed(11)
    return collate([source[0]]), recorder, torch.get_rng_state()


@pytest.mark.parametrize("name", CASES)
def test_same_features_and_same_draws(processed: Path, name: str) -> None:
    expected, stock_call, stock_state = featurise(dataset(processed, name))
    source = dataset(processed, name)
    features.CompactFeaturizer.install(source)
    compact, call, state = featurise(source)

    view = dense_view(compact)
    assert set(view) == set(expected) - TRAINING_ONLY
    for key in view:
        if key == "record":
            assert [r.id for r in view[key]] == [r.id for r in expected[key]] == [name]
            continue
        assert view[key].dtype == expected[key].dtype, key
        assert view[key].shape == expected[key].shape, key
        assert torch.equal(view[key], expected[key]), key
    assert torch.equal(state, stock_state)
    ours = call.options["random"].bit_generator.state
    assert ours == stock_call.options["random"].bit_generator.state
    for key, dtype in INDEX_DTYPES.items():
        assert compact[key].dtype == dtype, key


def test_cases_exercise_the_sparse_features(processed: Path) -> None:
    """The comparison above means something only where the sparse lists are not empty."""
    found = {}
    for name in ("alignments", "paired", "ligand", "modified", "template"):
        source = dataset(processed, name)
        features.CompactFeaturizer.install(source)
        found[name], _, _ = featurise(source)
    kinds = const.contact_conditioning_info
    assert set(found["ligand"]["contact_type"][0].tolist()) == {
        kinds["CONTACT"],
        kinds["POCKET>BINDER"],
        kinds["BINDER>POCKET"],
    }
    assert found["ligand"]["contact_default"].tolist() == [kinds["UNSELECTED"]]
    assert found["alignments"]["contact_default"].tolist() == [kinds["UNSPECIFIED"]]
    assert found["ligand"]["contact_pair_index"].numel() > 0
    assert found["ligand"]["token_bond_index"].numel() > 0
    assert found["alignments"]["has_deletion"].any()
    assert found["alignments"]["msa"].shape[1] == 64
    assert not found["paired"]["msa_paired"].all()
    assert found["paired"]["msa_paired"][0, 1:].any()
    assert found["modified"]["modified"].sum() == 1
    assert set(found["modified"]["cyclic_period"][0].tolist()) == {0.0, 12.0, 16.0}
    assert found["template"]["template_mask"].sum() == len(OTHER)
    assert found["template"]["template_force"].all()


@pytest.mark.parametrize("seed", range(8))
def test_random_constraints_and_bonds_override_as_in_stock(processed: Path, seed: int) -> None:
    """Overlapping constraints in random order, repeated bonds, and token numbers with gaps."""
    random = np.random.default_rng(seed)
    _, call, _ = featurise(dataset(processed, "ligand"))
    kept = np.sort(random.choice(len(call.data.tokens), 5 + 4 * seed, replace=False))
    tokens = call.data.tokens[kept]
    bonds = np.zeros(12, dtype=call.data.bonds.dtype)
    for end in ("token_1", "token_2"):
        bonds[end] = random.choice(tokens["token_idx"], 12)
    bonds["type"] = random.integers(1, 6, 12)
    data = dataclasses.replace(call.data, tokens=tokens, bonds=bonds)

    def place() -> tuple[int, int]:
        token = tokens[random.integers(len(tokens))]
        is_ligand = token["mol_type"] == const.chain_type_ids["NONPOLYMER"]
        number = token["atom_idx" if is_ligand else "res_idx"] + int(random.random() < 0.1) * 10**6
        return int(token["asym_id"]), int(number)

    pockets = [
        (int(random.integers(4)), [place() for _ in range(3)], float(random.integers(4, 9)), False)
        for _ in range(seed % 4)
    ]
    contacts = [(place(), place(), float(random.integers(4, 9)), False) for _ in range(seed % 3)]
    expected = stock.process_token_features(
        data,
        random,
        inference_pocket_constraints=pockets,
        inference_contact_constraints=contacts,
    )
    compact = {
        **features.token_features(data, None),
        **features.bond_features(data),
        **features.contact_features(tokens, pockets, contacts),
    }
    view = dense_view({key: value[None] for key, value in compact.items()})
    for key in ("token_bonds", "type_bonds", "contact_conditioning", "contact_threshold"):
        assert torch.equal(view[key][0], expected[key]), key


def random_msa(residues: np.ndarray, depth: int, random: np.random.Generator) -> MSA:
    """An alignment of `residues` with taxonomies to pair by and deletions in every row."""
    length = len(residues)
    types = random.integers(2, 33, (depth, length))
    types[0] = residues["res_type"]
    counts = [(i, int(random.integers(1, 300))) for i in range(0, length, 2)]
    # Stock cuts each row's deletions out of the previous row's cut: nested ones survive.
    ends = np.sort(random.integers(0, len(counts) + 1, depth))[::-1]
    taxonomy = random.integers(-1, 5, depth)
    rows = [
        (i, int(taxonomy[i]), i * length, (i + 1) * length, 0, int(ends[i])) for i in range(depth)
    ]
    return MSA(
        residues=np.array([(t,) for t in types.ravel().tolist()], dtype=MSAResidue),
        deletions=np.array(counts, dtype=MSADeletion),
        sequences=np.array(rows, dtype=MSASequence),
    )


@pytest.mark.parametrize("depth", [1, 7, 64, 700])
def test_msa_features_are_bitwise_stock(
    processed: Path, monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    """Paired rows, gaps, deletions everywhere, depths that divide no float, several chunks."""
    monkeypatch.setattr(rebound, "_CELLS_PER_CHUNK", 1000)
    random = np.random.default_rng(depth)
    _, call, _ = featurise(dataset(processed, "alignments"))
    structure = call.data.structure
    msa = {}
    for chain, rows in zip(structure.chains, (depth, depth // 2 + 1), strict=True):
        residues = structure.residues[chain["res_idx"] : chain["res_idx"] + chain["res_num"]]
        msa[int(chain["asym_id"])] = random_msa(residues, rows, random)
    data = dataclasses.replace(call.data, msa=msa)
    max_seqs = depth + 3
    expected = stock.process_msa_features(data, random, max_seqs, max_seqs)
    ours = rebound.msa_features(data, random, max_seqs)
    assert set(ours) == set(expected)
    for key in expected:
        assert torch.equal(ours[key].to(expected[key].dtype), expected[key]), key
    if depth > 1:
        assert expected["has_deletion"].float().mean() > 0.05


class LargestTensor(TorchDispatchMode):
    """Records the greatest number of elements that any operation returned."""

    numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = (leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))
        self.numel = max([self.numel, *sizes])
        return out


def test_memory_is_linear(processed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """600 and 1,200 residues: no tensor near N x N elements, each stage's host peak in O(N)."""
    peaks: dict[str, list[int]] = {stage: [] for stage in BYTES_PER_TOKEN}

    def traced(stage: str) -> Callable[..., Any]:
        function = getattr(features, stage)

        def call(*args: Any) -> Any:
            tracemalloc.start()
            try:
                out = function(*args)
                peaks[stage].append(tracemalloc.get_traced_memory()[1])
            finally:
                tracemalloc.stop()
            return out

        return call

    for stage in BYTES_PER_TOKEN:
        monkeypatch.setattr(features, stage, traced(stage))
    for name in ("short", "long"):
        source = dataset(processed, name)
        features.CompactFeaturizer.install(source)
        with LargestTensor() as largest:
            compact, _, _ = featurise(source)
    assert compact["token_index"].shape == (1, LONG)
    assert largest.numel < LONG**2 / 10
    for stage, (short, long) in peaks.items():
        assert long < 2.2 * short + 10e3, (stage, short, long)
        assert long < BYTES_PER_TOKEN[stage] * LONG, (stage, short, long)


def test_install_replaces_only_the_structure_pass(processed: Path) -> None:
    source = dataset(processed, "monomer")
    functions = dict(vars(stock))
    features.CompactFeaturizer.install(source)
    features.CompactFeaturizer.install(source)
    assert type(source.featurizer) is features.CompactFeaturizer
    source[0]
    assert dict(vars(stock)) == functions

    affinity = dataset(processed, "monomer", affinity=True)
    features.CompactFeaturizer.install(affinity)
    assert type(affinity.featurizer) is stock.Boltz2Featurizer

    with pytest.raises(TypeError, match="Boltz2Featurizer"):
        features.CompactFeaturizer.install(object())


def test_options_of_training_are_refused(processed: Path) -> None:
    _, call, _ = featurise(dataset(processed, "monomer"))
    options = {**call.options, "max_tokens": 64}
    with pytest.raises(ValueError, match="`max_tokens` is 64"):
        features.CompactFeaturizer().process(call.data, **options)


def test_dense_view_refuses_stock_features_and_two_samples(processed: Path) -> None:
    source = dataset(processed, "monomer")
    with pytest.raises(ValueError, match="contact_default"):
        dense_view(collate([source[0]]))
    features.CompactFeaturizer.install(source)
    with pytest.raises(ValueError, match=r"\[2, 33\]"):
        dense_view(collate([source[0], source[0]]))
    view = dense_view(collate([source[0]]))
    assert "disto_target" not in view
    assert "contact_index" not in view
