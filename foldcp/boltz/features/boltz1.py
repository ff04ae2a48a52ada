"""Compact Boltz-1 inference features: indices and sparse lists, no one-hot and no N x N tensor.

The names are those of Boltz-2's compact table (boltz2.py) wherever the meaning is the same;
`pocket_feature` [N] is Boltz-1's own. Every draw happens in stock's order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from boltz.data import const
from boltz.data.feature import featurizer as stock
from boltz.data.types import Tokenized
from torch import Tensor, from_numpy

from foldcp.boltz.features.common import (
    INFERENCE_OPTIONS,
    bonded_pairs,
    check_featurizer,
    check_options,
)
from foldcp.boltz.features.stock import (
    TorchWith,
    alignment_features,
    keep_index,
    msa_names,
    pad_if_present,
)
from foldcp.boltz.seams.rebind import rebind

# Options of stock's `process` and the one value each has at inference.
_OPTIONS: dict[str, Any] = INFERENCE_OPTIONS | {"symmetries": {}, "compute_symmetries": False}
_ATOM_KEYS = (
    "ref_pos",
    "ref_charge",
    "ref_element",
    "ref_atom_name_chars",
    "ref_space_uid",
    "atom_pad_mask",
    "atom_to_token",
    "token_to_rep_atom",
    "frames_idx",
)


class CompactFeaturizer(stock.BoltzFeaturizer):
    """Boltz-1's featuriser for inference, in memory linear in tokens, atoms and MSA cells."""

    @classmethod
    def install(cls, dataset: Any) -> None:
        """Make a stock Boltz-1 `PredictionDataset` hand out compact features.

        Args:
            dataset: a `boltz.data.module.inference.PredictionDataset`.

        Raises:
            TypeError: when `dataset` does not use Boltz-1's featuriser.
        """
        expected = "boltz.data.module.inference.PredictionDataset (Boltz-2: features.boltz2)"
        check_featurizer(dataset, stock.BoltzFeaturizer, expected)
        dataset.featurizer = cls()

    def process(
        self,
        data: Tokenized,
        max_seqs: int = 4096,
        inference_binder: int | None = None,
        inference_pocket: list[tuple[int, int]] | None = None,
        **options: Any,
    ) -> dict[str, Tensor]:
        """Compute the compact features of one tokenised input.

        Args:
            data: the tokenised structure with its MSA and constraints.
            max_seqs: greatest number of MSA rows.
            inference_binder: chain (asym) of the binder of the pocket constraint, None without.
            inference_pocket: `(asym, residue)` of each pocket residue.
            options: stock's remaining options; each must have its inference value.

        Returns:
            The features of foldcp's compact table.

        Raises:
            ValueError: when an option asks for what only training uses.
        """
        check_options(options, _OPTIONS, "BoltzFeaturizer for training")
        return {
            **token_features(data.tokens),
            **bond_features(data),
            "pocket_feature": pocket_feature(data.tokens, inference_binder, inference_pocket),
            **atom_features(data),
            **msa_features(data, max_seqs),
            **stock.process_residue_constraint_features(data),
            **stock.process_chain_feature_constraints(data),
        }


def token_features(tokens: np.ndarray) -> dict[str, Tensor]:
    """Compute per-token features: long [N] identities, float [N] masks and cyclic periods.

    Args:
        tokens: stock's token table, N rows.
    """
    names = ("asym_id", "entity_id", "sym_id", "mol_type", "res_type")
    return {
        "token_index": torch.arange(len(tokens)),
        "residue_index": from_numpy(tokens["res_idx"].astype(np.int64)),
        **{name: from_numpy(tokens[name].astype(np.int64)) for name in names},
        "token_pad_mask": torch.ones(len(tokens)),
        "cyclic_period": from_numpy(tokens["cyclic_period"].astype(np.float32)),
    }


def bond_features(data: Tokenized) -> dict[str, Tensor]:
    """List the bonded token pairs in both directions.

    Args:
        data: the tokenised structure.

    Returns:
        `token_bond_index` long [nb, 2], sorted and unique.
    """
    return {"token_bond_index": bonded_pairs(data)[0]}


def pocket_feature(
    tokens: np.ndarray, binder: int | None, pocket: list[tuple[int, int]] | None
) -> Tensor:
    """Classify each token's part in the pocket constraint, as an index into Boltz's classes.

    Args:
        tokens: stock's token table, N rows.
        binder: chain (asym) of the binder, None without a constraint.
        pocket: `(asym, residue)` of each pocket residue.

    Returns:
        long [N].
    """
    kinds = const.pocket_contact_info
    if binder is None:
        return torch.full((len(tokens),), kinds["UNSPECIFIED"])
    wanted = {tuple(place) for place in pocket or ()}
    places = zip(tokens["asym_id"].tolist(), tokens["res_idx"].tolist(), strict=True)
    inside = np.array([place in wanted for place in places])
    found = np.where(inside, kinds["POCKET"], kinds["UNSELECTED"])
    return from_numpy(np.where(tokens["asym_id"] == binder, kinds["BINDER"], found))


def atom_features(data: Tokenized) -> dict[str, Tensor]:
    """Compute reference conformers and atom identities, A atoms padded to a multiple of 32.

    Args:
        data: the tokenised structure.

    Returns:
        `ref_pos` float [A, 3] in angstrom ... `frames_idx` long [N, 3] of the compact table; all
        conformers are turned and shifted as one, as stock draws.

    Raises:
        ValueError: when an atom's element has no class in Boltz's vocabulary.
    """
    empty = torch.empty(0, 0)
    featurise = rebind(
        stock.process_atom_features,
        one_hot=keep_index,
        pad_dim=pad_if_present,
        torch=TorchWith(cdist=lambda *points: empty),  # the token distances [N, N]
    )
    feats = featurise(data)
    return {key: feats[key] for key in _ATOM_KEYS}


def msa_features(data: Tokenized, max_seqs: int) -> dict[str, Tensor]:
    """Pair an alignment to S rows with profile, see `foldcp.boltz.features.stock.msa_features`.

    Args:
        data: the tokenised structure with one alignment per chain that has one.
        max_seqs: greatest S.
    """
    pair = rebind(stock.construct_paired_msa, **msa_names(stock))
    return alignment_features(*pair(data, max_seqs))
