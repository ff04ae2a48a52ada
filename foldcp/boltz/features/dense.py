"""Stock Boltz-2 feature tensors, rebuilt from compact features one key at a time.

Compact features (boltz2.py) hold indices and sparse lists. Code written for stock
Boltz (steering potentials, parity tests) wants one-hot and N x N tensors under the same names;
the view below builds such a tensor when its key is read and keeps nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from boltz.data import const
from torch import Tensor
from torch.nn.functional import one_hot

SPARSE_KEYS = frozenset(
    {
        "token_bond_index",
        "token_bond_type",
        "contact_index",
        "contact_type",
        "contact_threshold_value",
        "contact_default",
    }
)
NUM_ATOM_NAME_CHARS = 64
NUM_BACKBONE_FEATS = (
    1 + len(const.protein_backbone_atom_index) + len(const.nucleic_backbone_atom_index)
)


def dense_view(feats: Mapping[str, Tensor]) -> DenseView:
    """Show collated compact features under stock Boltz-2's keys, shapes and dtypes.

    Args:
        feats: compact features of one sample after collate (leading dim 1 everywhere).

    Returns:
        A read-only mapping. Index and sparse features are expanded on access, on the device of
        the compact tensor, and not cached: `view["atom_to_token"]` costs O(A x N) every time.
        Keys that only training reads (`disto_target`, `coords`, ...) are absent.

    Raises:
        ValueError: when `feats` is not one collated sample of compact features.
    """
    return DenseView(feats)


class DenseView(Mapping):
    """Read-only mapping from stock's feature names to tensors built on access."""

    def __init__(self, feats: Mapping[str, Tensor]) -> None:
        missing = sorted(SPARSE_KEYS - set(feats))
        if missing:
            raise ValueError(
                f"`feats` has no {', '.join(missing)}; dense_view expects compact features: make "
                "them with foldcp.boltz.features.boltz2.CompactFeaturizer.install(dataset)"
            )
        shape = tuple(feats["res_type"].shape)
        if len(shape) != 2 or shape[0] != 1:
            raise ValueError(
                f"`feats['res_type']` is {list(shape)}; dense_view expects [1, N]: collate exactly "
                "one sample"
            )
        self._feats = feats
        self._keys = [k for k in feats if k not in SPARSE_KEYS] + list(_FROM_SPARSE)

    def __getitem__(self, key: str) -> Tensor:
        if key in SPARSE_KEYS:
            raise KeyError(key)
        build = _FROM_SPARSE.get(key) or _FROM_INDEX.get(key)
        return self._feats[key] if build is None else build(self._feats)

    def __contains__(self, key: object) -> bool:
        return key in _FROM_SPARSE or (key in self._feats and key not in SPARSE_KEYS)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _atom_one_hot(key: str, num_classes: int) -> Callable[[Mapping[str, Tensor]], Tensor]:
    def build(feats: Mapping[str, Tensor]) -> Tensor:
        dense = one_hot(feats[key], num_classes=num_classes)
        # Padding atoms carry index 0 in the compact form, and no class at all in stock's.
        real = feats["atom_pad_mask"].bool()
        return dense.mul_(real.reshape(*real.shape, *[1] * (dense.ndim - real.ndim)))

    return build


def _atom_to_token(feats: Mapping[str, Tensor]) -> Tensor:
    return _atom_one_hot("atom_to_token", feats["res_type"].shape[1])(feats)  # [1, A, N]


def _token_to_rep_atom(feats: Mapping[str, Tensor]) -> Tensor:
    num_atoms = feats["atom_pad_mask"].shape[1]
    return one_hot(feats["token_to_rep_atom"], num_classes=num_atoms)  # [1, N, A]


def _scatter_pairs(
    feats: Mapping[str, Tensor], index: Tensor, value: Tensor, fill: Tensor | int
) -> Tensor:
    """Dense [1, N, N] of `value`'s dtype: `fill` everywhere, `value` [1, n] at the n pairs."""
    num_tokens = feats["res_type"].shape[1]
    out = value.new_zeros(1, num_tokens, num_tokens) + fill
    out[0, index[0, :, 0], index[0, :, 1]] = value[0]
    return out


def _token_bonds(feats: Mapping[str, Tensor]) -> Tensor:
    index = feats["token_bond_index"]
    ones = torch.ones(index.shape[:2], device=index.device)
    return _scatter_pairs(feats, index, ones, 0).unsqueeze(-1)  # [1, N, N, 1]


def _type_bonds(feats: Mapping[str, Tensor]) -> Tensor:
    return _scatter_pairs(feats, feats["token_bond_index"], feats["token_bond_type"], 0)


def _contact_conditioning(feats: Mapping[str, Tensor]) -> Tensor:
    kind, fill = feats["contact_type"], feats["contact_default"]
    dense = _scatter_pairs(feats, feats["contact_index"], kind, fill)
    return one_hot(dense, num_classes=len(const.contact_conditioning_info))  # [1, N, N, 5]


def _contact_threshold(feats: Mapping[str, Tensor]) -> Tensor:
    return _scatter_pairs(feats, feats["contact_index"], feats["contact_threshold_value"], 0)


def _token_one_hot(key: str) -> Callable[[Mapping[str, Tensor]], Tensor]:
    return lambda feats: one_hot(feats[key], num_classes=const.num_tokens)


_FROM_SPARSE: dict[str, Callable[[Mapping[str, Tensor]], Tensor]] = {
    "token_bonds": _token_bonds,
    "type_bonds": _type_bonds,
    "contact_conditioning": _contact_conditioning,
    "contact_threshold": _contact_threshold,
}
_FROM_INDEX: dict[str, Callable[[Mapping[str, Tensor]], Tensor]] = {
    "res_type": _token_one_hot("res_type"),
    "template_restype": _token_one_hot("template_restype"),
    "ref_element": _atom_one_hot("ref_element", const.num_elements),
    "ref_atom_name_chars": _atom_one_hot("ref_atom_name_chars", NUM_ATOM_NAME_CHARS),
    "atom_backbone_feat": _atom_one_hot("atom_backbone_feat", NUM_BACKBONE_FEATS),
    "atom_to_token": _atom_to_token,
    "token_to_rep_atom": _token_to_rep_atom,
    "msa": lambda feats: feats["msa"].long(),
    "msa_paired": lambda feats: feats["msa_paired"].float(),
    "msa_mask": lambda feats: feats["msa_mask"].long(),
}
