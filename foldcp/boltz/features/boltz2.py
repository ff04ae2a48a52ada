"""Compact Boltz-2 inference features: indices and sparse lists, no one-hot and no N x N tensor.

Token and pair features are computed here from the tokenised structure; atom, MSA and template
features come from stock's code without its dense tensors (stock.py). Every draw from the numpy
and torch generators happens in stock's order.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from boltz.data import const
from boltz.data.feature import featurizerv2 as stock
from boltz.data.types import Tokenized
from torch import Tensor, from_numpy

from foldcp.boltz.features.common import (
    INFERENCE_OPTIONS,
    bonded_pairs,
    check_featurizer,
    check_options,
    last_of_each_pair,
)
from foldcp.boltz.features.dense import dense_view
from foldcp.boltz.features.stock import atom_features, msa_features, template_features

__all__ = ["CompactFeaturizer", "dense_view"]

# Options of stock's `process` and the one value each has at inference.
_OPTIONS: dict[str, Any] = INFERENCE_OPTIONS | {
    "single_sequence_prop": 0.0,
    "compute_frames": True,
    "compute_affinity": False,
}


class CompactFeaturizer(stock.Boltz2Featurizer):
    """Boltz-2's featuriser for inference, in memory linear in tokens, atoms and MSA cells."""

    @classmethod
    def install(cls, dataset: Any) -> None:
        """Make a stock Boltz-2 `PredictionDataset` hand out compact features.

        Args:
            dataset: a `boltz.data.module.inferencev2.PredictionDataset`. One made for the affinity
                pass is left as it is: affinity models run on stock features.

        Raises:
            TypeError: when `dataset` does not use Boltz-2's featuriser.
        """
        expected = "boltz.data.module.inferencev2.PredictionDataset (Boltz-1: features.boltz1)"
        check_featurizer(dataset, stock.Boltz2Featurizer, expected)
        if not dataset.affinity:
            dataset.featurizer = cls()

    def process(
        self,
        data: Tokenized,
        random: np.random.Generator,
        molecules: dict[str, Any],
        max_seqs: int,
        override_method: str | None = None,
        inference_pocket_constraints: list | None = None,
        inference_contact_constraints: list | None = None,
        **options: Any,
    ) -> dict[str, Tensor]:
        """Compute the compact features of one tokenised input.

        Args:
            data: the tokenised structure with its MSA, templates and constraints.
            random: generator of the conformer choice, consumed as by stock.
            molecules: RDKit molecules by CCD code.
            max_seqs: greatest number of MSA rows.
            override_method: experimental method to condition on, as `--method`.
            inference_pocket_constraints: `(binder, contacts, distance in angstrom, force)` each.
            inference_contact_constraints: `(token1, token2, distance in angstrom, force)` each.
            options: stock's remaining options; each must have its inference value.

        Returns:
            The features of foldcp's compact table; `dense_view` shows them as stock's tensors.

        Raises:
            ValueError: when an option asks for what only training or affinity uses.
        """
        check_options(options, _OPTIONS, "Boltz2Featurizer for training and affinity")
        pockets = inference_pocket_constraints or []
        contacts = inference_contact_constraints or []
        return {
            **token_features(data, override_method),
            **bond_features(data),
            **contact_features(data.tokens, pockets, contacts),
            **atom_features(data, random, molecules),
            **msa_features(data, random, max_seqs),
            **template_features(data),
            **stock.process_residue_constraint_features(data),
            **stock.process_chain_feature_constraints(data),
            **stock.process_contact_feature_constraints(data, pockets, contacts),
        }


def token_features(data: Tokenized, override_method: str | None) -> dict[str, Tensor]:
    """Compute per-token features: long [N] identities, float [N] masks and cyclic periods.

    Args:
        data: the tokenised structure.
        override_method: experimental method that replaces the record's, or None.

    Returns:
        `token_index` ... `affinity_token_mask` of the compact table.

    Raises:
        KeyError: when `override_method` is not one of Boltz's method names.
    """
    tokens = data.tokens
    num_tokens = len(tokens)
    method = "x-ray diffraction" if override_method is None else override_method.lower()
    if override_method is None and data.record is not None:
        recorded = (data.record.structure.method or "").lower()
        method = recorded if recorded in const.method_types_ids else method
    feats = {
        name: from_numpy(tokens[field].astype(np.int64))
        for name, field in [
            ("residue_index", "res_idx"),
            ("asym_id", "asym_id"),
            ("entity_id", "entity_id"),
            ("sym_id", "sym_id"),
            ("mol_type", "mol_type"),
            ("res_type", "res_type"),
            ("modified", "modified"),
        ]
    }
    period = np.maximum(_bonded_cycles(data)[tokens["asym_id"]], tokens["cyclic_period"])
    return {
        "token_index": torch.arange(num_tokens),
        **feats,
        "method_feature": torch.full((num_tokens,), const.method_types_ids[method]),
        "token_pad_mask": torch.ones(num_tokens),
        "cyclic_period": from_numpy(period.astype(np.float32)),
        "affinity_token_mask": from_numpy(tokens["affinity_mask"].astype(np.float32)),
    }


def _bonded_cycles(data: Tokenized) -> np.ndarray:
    """Number of residues of each chain whose first and last residue are bonded, else 0, by asym."""
    chains, bonds = data.structure.chains, data.structure.bonds
    period = np.zeros(int(chains["asym_id"].max()) + 1, dtype=np.int64)
    bonds = bonds[bonds["chain_1"] == bonds["chain_2"]]
    size = chains["res_num"][bonds["chain_1"]]
    first = np.minimum(bonds["res_1"], bonds["res_2"])
    last = np.maximum(bonds["res_1"], bonds["res_2"])
    closing = (size > 2) & (first == 0) & (last == size - 1)
    period[chains["asym_id"][bonds["chain_1"][closing]]] = size[closing]
    return period


def bond_features(data: Tokenized) -> dict[str, Tensor]:
    """List the bonded token pairs in both directions.

    Args:
        data: the tokenised structure.

    Returns:
        `token_bond_index` long [nb, 2], sorted and unique, and `token_bond_type` long [nb]; the
        last bond listed between two tokens decides the type.
    """
    index, bond = bonded_pairs(data)
    return {
        "token_bond_index": index,
        "token_bond_type": from_numpy(data.bonds["type"].astype(np.int64)[bond]),
    }


def contact_features(
    tokens: np.ndarray, pockets: Iterable[tuple], contacts: Iterable[tuple]
) -> dict[str, Tensor]:
    """List the token pairs under a pocket or contact constraint.

    Args:
        tokens: stock's token table, N rows.
        pockets: `(binder asym, [(asym, residue or atom)], distance in angstrom, force)` each.
        contacts: `((asym, residue or atom), (asym, residue or atom), distance, force)` each.

    Returns:
        `contact_index` long [nc, 2] sorted and unique, `contact_type` long [nc],
        `contact_threshold_value` float [nc] in angstrom, `contact_default` long []: the type of
        every other pair. Later constraints override earlier ones, contacts override pockets.
    """
    kinds = const.contact_conditioning_info
    is_ligand = tokens["mol_type"] == const.chain_type_ids["NONPOLYMER"]
    number = np.where(is_ligand, tokens["atom_idx"], tokens["res_idx"])
    places = list(zip(tokens["asym_id"].tolist(), number.tolist(), strict=True))
    written: list[tuple[np.ndarray, np.ndarray, float]] = [
        (np.empty((0, 2), np.int64), np.empty(0, np.int64), 0.0)
    ]
    for binder, pocket, distance, _ in pockets:
        members = np.flatnonzero(tokens["asym_id"] == binder)
        wanted = set(pocket)
        for i_token in (i for i, place in enumerate(places) if place in wanted):
            to_pocket = np.stack([members, np.full_like(members, i_token)], axis=1)
            pairs = np.concatenate([to_pocket, to_pocket[:, ::-1]])
            pair_kinds = [kinds["BINDER>POCKET"], kinds["POCKET>BINDER"]]
            written.append((pairs, np.repeat(pair_kinds, len(members)), distance))
    position: dict[tuple[int, int], int] = {}
    for i_token, place in enumerate(places):
        position.setdefault(place, i_token)
    for place_1, place_2, distance, _ in contacts:
        i, j = position.get(place_1), position.get(place_2)
        if i is not None and j is not None:
            written.append((np.array([[i, j], [j, i]]), np.repeat(kinds["CONTACT"], 2), distance))
    index, last = last_of_each_pair(np.concatenate([w[0] for w in written]), len(tokens))
    threshold = np.concatenate([np.full(len(kind), d, np.float32) for _, kind, d in written])
    default = kinds["UNSELECTED"] if len(last) else kinds["UNSPECIFIED"]
    return {
        "contact_index": index,
        "contact_type": from_numpy(np.concatenate([w[1] for w in written])[last]),
        "contact_threshold_value": from_numpy(threshold[last]),
        "contact_default": torch.tensor(default),
    }
