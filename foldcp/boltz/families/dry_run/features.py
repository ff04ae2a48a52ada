"""Make the features of an input of any size, which nobody read from a file."""

from __future__ import annotations

import torch
from torch import Tensor

ATOMS_PER_TOKEN = 8


def features(
    n: int, sequences: int = 1, chains: int = 1, atoms: int | None = None
) -> dict[str, Tensor]:
    """Make collated compact features of protein chains, without a template.

    Args:
        n: tokens.
        sequences: rows of the alignment.
        chains: of about equal length.
        atoms: spread evenly over the tokens, None for `ATOMS_PER_TOKEN` of each.
    """
    atoms = n * ATOMS_PER_TOKEN if atoms is None else atoms
    windows = -(-atoms // 32) * 32
    token = torch.arange(n)
    chain = token * chains // n
    pad = torch.zeros(windows)
    pad[:atoms] = 1
    of_atom = torch.zeros(windows, dtype=torch.long)
    of_atom[:atoms] = torch.arange(atoms) * n // atoms
    first = -(-token * atoms // n)
    none = torch.zeros(n, dtype=torch.long)
    feats = {
        "token_index": token, "residue_index": token, "asym_id": chain, "entity_id": chain,
        "sym_id": none, "mol_type": none, "method_feature": none, "modified": none,
        "res_type": 2 + token % 20, "token_pad_mask": torch.ones(n),
        "cyclic_period": torch.zeros(n), "affinity_token_mask": torch.zeros(n),
        "token_bond_index": torch.zeros(0, 2, dtype=torch.long),
        "token_bond_type": torch.zeros(0, dtype=torch.long),
        "contact_index": torch.zeros(0, 2, dtype=torch.long),
        "contact_type": torch.zeros(0, dtype=torch.long),
        "contact_threshold_value": torch.zeros(0), "contact_default": torch.tensor(0),
        "ref_pos": torch.randn(windows, 3), "ref_charge": torch.zeros(windows),
        "ref_element": 6 * pad.long(),
        "ref_atom_name_chars": torch.zeros(windows, 4, dtype=torch.long),
        "atom_backbone_feat": torch.zeros(windows, dtype=torch.long), "ref_space_uid": of_atom,
        "atom_pad_mask": pad, "atom_to_token": of_atom,
        "token_to_rep_atom": (first + 1).clamp(max=atoms - 1),
        "frames_idx": (first[:, None] + torch.arange(3)).clamp(max=atoms - 1)[None],
        "msa": (2 + token % 20).to(torch.uint8).expand(sequences, n).contiguous(),
        "msa_paired": torch.zeros(sequences, n), "msa_mask": torch.ones(sequences, n).bool(),
        "has_deletion": torch.zeros(sequences, n).bool(),
        "deletion_value": torch.zeros(sequences, n), "deletion_mean": torch.zeros(n),
        "profile": torch.zeros(n, 33), "template_mask": torch.zeros(1, n), "pocket_feature": none,
    }  # fmt: skip
    return {name: value[None] for name, value in feats.items()}
