"""Stock Boltz-2's atom, MSA and template features without their dense tensors.

Stock's own functions run over a private copy of their globals in which the few names that build
a one-hot, an N x N or a wide MSA tensor are replaced. The stock module is never modified, so
nothing has to be restored after an error and threads that use it see no change.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from boltz.data import const
from boltz.data.feature import featurizerv2 as stock
from boltz.data.types import Tokenized
from boltz.model.modules.utils import center_random_augmentation
from torch import Tensor, from_numpy

from foldcp.boltz.seams.rebind import rebind

_ATOM_KEYS = (
    "ref_pos",
    "ref_charge",
    "ref_element",
    "ref_atom_name_chars",
    "atom_backbone_feat",
    "ref_space_uid",
    "atom_pad_mask",
    "atom_to_token",
    "token_to_rep_atom",
    "frames_idx",
)
_CELLS_PER_CHUNK = 1 << 20


class TorchWith:
    """`torch` with some functions replaced; every other attribute is torch's own."""

    def __init__(self, **replaced: Any) -> None:
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class Discarded:
    """Stands for a dense tensor that inference does not read: writing to it does nothing."""

    def __setitem__(self, key: object, value: object) -> None:
        pass


def keep_index(index: Tensor, num_classes: int) -> Tensor:
    """Replace `one_hot` by the class indices themselves, checked as `one_hot` checks them.

    Args:
        index: class indices, long.
        num_classes: number of classes.

    Raises:
        ValueError: an index is not below `num_classes`.
    """
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < num_classes:
        raise ValueError(
            f"`index` holds classes {int(index.min())} to {int(index.max())}; expected 0 to "
            f"{num_classes - 1}: the input names an atom or residue that Boltz cannot encode"
        )
    return index


def pad_if_present(data: Tensor, dim: int, pad_len: int, value: float = 0) -> Tensor:
    """Replace `pad_dim`: an index tensor has no class dim to pad.

    Args:
        data: the tensor.
        dim: dimension to pad.
        pad_len: elements to add at its end.
        value: their value.
    """
    return stock.pad_dim(data, dim, pad_len, value) if dim < data.ndim else data


def atom_features(
    data: Tokenized, random: np.random.Generator, molecules: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Compute reference conformers and atom identities, A atoms padded to a multiple of 32.

    Args:
        data: the tokenised structure.
        random: generator of the conformer choice, one draw per residue.
        molecules: RDKit molecules by CCD code.

    Returns:
        `ref_pos` float [A, 3] in angstrom ... `frames_idx` long [1, N, 3] of the compact table.

    Raises:
        ValueError: when an atom's element or name has no class in Boltz's vocabulary.
    """
    empty = torch.empty(0, 0)
    featurise = rebind(
        stock.process_atom_features,
        one_hot=keep_index,
        pad_dim=pad_if_present,
        torch=TorchWith(
            zeros=lambda *shape: Discarded(),  # the distogram target [N, N, 1, 64]
            cdist=lambda *points: empty,  # its token distances [N, N]
            max=lambda values: 0,  # ends the loop that _augment_residues replaces
        ),
    )
    ensemble = stock.process_ensemble_features(data, random, 1, False, True)
    feats = featurise(data, random, ensemble, molecules, compute_frames=True)
    num_atoms = int(feats["atom_pad_mask"].sum())  # padding atoms share residue number 0
    per_atom = ("ref_pos", "ref_space_uid", "atom_resolved_mask")
    _augment_residues(*(feats[key][:num_atoms] for key in per_atom))
    return {key: feats[key] for key in _ATOM_KEYS}


def _augment_residues(ref_pos: Tensor, uid: Tensor, resolved: Tensor) -> None:
    """Centre and randomly rotate and shift each residue's conformer, in place, as stock draws.

    Stock compares all atoms with every residue number, O(A N); slices of the sorted numbers give
    the same atoms in the same order. Stock stops before the highest number: so does this.
    """
    counts = torch.bincount(uid)
    order = torch.argsort(uid, stable=True)
    for rows in order.split(counts.tolist())[:-1]:
        if torch.any(resolved[rows]):
            ref_pos[rows] = center_random_augmentation(
                ref_pos[rows][None], resolved[rows][None], centering=True
            )[0]


def msa_features(data: Tokenized, random: np.random.Generator, max_seqs: int) -> dict[str, Tensor]:
    """Pair an alignment of S rows and compute its profile.

    Args:
        data: the tokenised structure with one alignment per chain that has one.
        random: not drawn from at inference.
        max_seqs: greatest S.

    Returns:
        `msa` uint8 [S, N], `msa_paired`, `has_deletion`, `msa_mask` bool [S, N],
        `deletion_value` float [S, N], `deletion_mean` float [N], `profile` float [N, 33].

    Raises:
        ValueError: when the alignment holds a residue type outside Boltz's vocabulary.
    """
    pair = rebind(stock.construct_paired_msa, **msa_names(stock))
    return alignment_features(*pair(data, random, max_seqs))


def msa_names(module: Any) -> dict[str, Any]:
    """Return replacements for the names that stock's `construct_paired_msa` builds with.

    Args:
        module: the stock featuriser's module.
    """
    dictionary = SimpleNamespace(Dict=SimpleNamespace(empty=lambda **types: {}))
    return {
        "prepare_msa_arrays": _msa_arrays,
        "numba": SimpleNamespace(typed=dictionary, types=module.numba.types),
        "torch": TorchWith(tensor=lambda array, dtype: array),
    }


def alignment_features(
    msa: np.ndarray, deletion: np.ndarray | None, paired: np.ndarray
) -> dict[str, Tensor]:
    """Return the features of a paired alignment, see `msa_features`.

    Args:
        msa: residue types, uint8 [S, N].
        deletion: float32 [N, S], None without any.
        paired: bool [S, N].
    """
    keep_index(from_numpy(msa), const.num_tokens)
    # Counts are exact integers, so counts / S is the float mean of the one-hot, bit for bit.
    counts = np.stack([np.count_nonzero(msa == c, axis=0) for c in range(const.num_tokens)], 1)
    if deletion is None:
        value = torch.zeros(msa.shape)
    else:  # float [N, S] transposed, as in stock: the order of the mean's sum depends on it
        value = np.pi / 2 * np.arctan(from_numpy(deletion).T / 3)
    return {
        "msa": from_numpy(msa),
        "msa_paired": from_numpy(paired),
        "deletion_value": value,
        "has_deletion": value > 0,
        "deletion_mean": value.mean(dim=0),
        "profile": from_numpy(counts).float() / msa.shape[0],
        "msa_mask": torch.ones(msa.shape, dtype=torch.bool),
    }


def _msa_arrays(
    tokens: np.ndarray, pairing: list[dict], is_paired: list[dict], deletions: dict, msa: dict
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Residue type uint8 [S, N], deletions float32 [N, S] (None: there are none), paired bool."""
    num_rows = len(pairing)
    types = np.full((num_rows, len(tokens)), const.token_ids["-"], dtype=np.uint8)
    paired = np.zeros((num_rows, len(tokens)), dtype=bool)
    deletion = np.zeros((len(tokens), num_rows), np.float32) if deletions else None
    for chain_id, chain_msa in msa.items():
        columns = np.flatnonzero(tokens["asym_id"] == chain_id)
        res_idx = tokens["res_idx"][columns]
        sequence = np.array([row[chain_id] for row in pairing])
        paired[:, columns] = np.array([row[chain_id] for row in is_paired], bool)[:, None]
        used = np.flatnonzero(sequence != -1)
        start = chain_msa.sequences["res_start"][sequence[used]]
        residues = chain_msa.residues["res_type"].astype(np.uint8)
        step = max(1, _CELLS_PER_CHUNK // max(1, len(columns)))
        for i in range(0, len(used), step):
            cells = np.ix_(used[i : i + step], columns)
            types[cells] = residues[start[i : i + step, None] + res_idx]
        for (of_chain, seq_idx, at_residue), number in deletions.items():
            if of_chain == chain_id:
                cells = np.ix_(columns[res_idx == at_residue], np.flatnonzero(sequence == seq_idx))
                deletion[cells] = number
    return types, deletion, paired


def template_features(data: Tokenized) -> dict[str, Tensor]:
    """Compute template features as stock's, with `template_restype` as a long index [T, N].

    Args:
        data: the tokenised structure and its templates, if any.

    Returns:
        The `template_*`, `query_to_template` and `visibility_ids` features of T templates; one
        empty template when there is none.
    """
    num_tokens = len(data.tokens)
    if not data.templates:
        dummy = rebind(stock.load_dummy_templates_features, one_hot=keep_index)
        return dummy(tdim=1, num_tokens=num_tokens)
    rows = rebind(stock.compute_template_features, one_hot=keep_index)
    return rebind(stock.process_template_features, compute_template_features=rows)(data, num_tokens)
