"""Check options and list bonds, alike for the compact features of Boltz-1 and Boltz-2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from boltz.data.types import Tokenized
from torch import Tensor, from_numpy

# Options of both featurisers' `process` and the one value each has at inference.
INFERENCE_OPTIONS: dict[str, Any] = {
    "training": False,
    "max_tokens": None,
    "max_atoms": None,
    "pad_to_max_seqs": False,
    "compute_constraint_features": True,
}


def check_featurizer(dataset: Any, stock: type, expected: str) -> None:
    """Refuse a dataset of another model.

    Args:
        dataset: that has a featuriser.
        stock: class of the featuriser that it should have.
        expected: the dataset that has it, for the message.

    Raises:
        TypeError: its featuriser is another one.
    """
    if not isinstance(getattr(dataset, "featurizer", None), stock):
        raise TypeError(
            f"`dataset` is {type(dataset).__name__} without a {stock.__name__}; install expects "
            f"{expected}"
        )


def check_options(options: Mapping[str, Any], expected: Mapping[str, Any], otherwise: str) -> None:
    """Refuse options of stock's `process` that have no compact features.

    Args:
        options: given, by name.
        expected: the one value of each option that is known.
        otherwise: what to use instead, for the message.

    Raises:
        ValueError: an option is unknown, or has another value.
    """
    for name, value in options.items():
        if name not in expected or value != expected[name]:
            raise ValueError(
                f"`{name}` is {value!r}; compact features expect inference options {expected}: "
                f"use stock's {otherwise}"
            )


def bonded_pairs(data: Tokenized) -> tuple[Tensor, np.ndarray]:
    """List the bonded token pairs in both directions, sorted and unique.

    Args:
        data: the tokenised structure.

    Returns:
        The pairs, long [nb, 2], and for each the bond [nb] in `data.bonds` that decides its type:
        the last one listed between two tokens.
    """
    token_idx = data.tokens["token_idx"]
    order = np.argsort(token_idx)  # after cropping a token's index is not its position
    ends = np.stack([data.bonds["token_1"], data.bonds["token_2"]], axis=1)  # [bonds, 2]
    ends = order[np.searchsorted(token_idx, ends, sorter=order)]
    pairs = np.stack([ends, ends[:, ::-1]], axis=1).reshape(-1, 2)
    index, last = last_of_each_pair(pairs, len(token_idx))
    return index, last // 2


def last_of_each_pair(pairs: np.ndarray, num_tokens: int) -> tuple[Tensor, np.ndarray]:
    """Sort pairs, long [n, 2], drop repeats, and return the position of each pair's last one.

    Args:
        pairs: long [n, 2].
        num_tokens: N.

    Returns:
        The sorted pairs, long [m, 2], and the index of the last occurrence of each, [m].
    """
    key = pairs[:, 0].astype(np.int64) * num_tokens + pairs[:, 1]
    unique, first_from_the_end = np.unique(key[::-1], return_index=True)
    index = np.stack([unique // num_tokens, unique % num_tokens], axis=1)
    return from_numpy(index), len(key) - 1 - first_from_the_end
