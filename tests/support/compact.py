"""A small complex as collated compact features, and what running stock Boltz in float64 needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

PROTEIN, DNA, NONPOLYMER = 0, 1, 3
# (molecule type, entity, copy, residues as atoms per residue, split in atom tokens, period)
CHAINS = (
    (PROTEIN, 0, 0, (3, 3, 4, 3, 5, 3, 3), (2,), 0),
    (PROTEIN, 0, 1, (3, 3, 4, 3, 5, 3, 3), (2,), 7),
    (DNA, 1, 0, (4, 5, 4, 4, 3, 4, 5), (), 0),
    (NONPOLYMER, 2, 0, (6,), (0,), 0),
    (PROTEIN, 0, 4, (3, 4, 3), (), 0),
    (NONPOLYMER, 3, 0, (1,), (0,), 0),
)
RESIDUE_STEP = 11  # residue numbers jump, so that offsets beyond 32 occur


def complex_feats(seed: int = 0, cyclic: bool = True, contacts: bool = True) -> dict[str, Tensor]:
    """Compact features of two protein copies (one cyclic), DNA, a ligand and an ion: N = 37.

    Modified residues have one token per atom. N is odd. Floats are float64.
    """
    tokens, atoms_of, rows = [], [], []
    for asym, (kind, entity, copy, residues, split, period) in enumerate(CHAINS):
        for residue, count in enumerate(residues):
            pieces = [1] * count if residue in split else [count]
            number = residue if period or kind == NONPOLYMER else residue * RESIDUE_STEP
            tokens += [(number, asym, entity, copy, kind, period)] * len(pieces)
            atoms_of += pieces
    n, real = len(tokens), sum(atoms_of)
    rows = torch.tensor(tokens)
    names = ("residue_index", "asym_id", "entity_id", "sym_id", "mol_type")
    feats = {name: rows[:, i] for i, name in enumerate(names)}
    total = -(-real // 32) * 32
    of_atom = torch.repeat_interleave(torch.arange(n), torch.tensor(atoms_of))
    first = torch.tensor(atoms_of).cumsum(0) - torch.tensor(atoms_of)
    last = first + torch.tensor(atoms_of) - 1
    frames = torch.stack([torch.minimum(first + i, last) for i in range(3)], -1)
    pad = torch.zeros(total, dtype=torch.float64)
    pad[:real] = 1
    g = torch.Generator().manual_seed(seed)
    bonds = torch.randint(0, n, (9, 2), generator=g)
    bonds = torch.unique(torch.cat([bonds, bonds.flip(1)]), dim=0)
    pairs = torch.unique(torch.randint(0, n, (17, 2), generator=g), dim=0)[: 17 * contacts]
    feats |= {
        "token_index": torch.arange(n),
        "res_type": torch.randint(2, 22, (n,), generator=g),
        "token_pad_mask": torch.ones(n, dtype=torch.float64),
        "cyclic_period": rows[:, 5].double() * cyclic,
        "token_bond_index": bonds,
        "token_bond_type": torch.randint(1, 6, (len(bonds),), generator=g),
        "contact_index": pairs,
        "contact_type": torch.randint(2, 5, (len(pairs),), generator=g),
        "contact_threshold_value": 4 + 8 * torch.rand(len(pairs), generator=g).double(),
        "contact_default": torch.tensor(int(contacts)),
        "atom_pad_mask": pad,
        "atom_to_token": torch.nn.functional.pad(of_atom, (0, total - real)),
        "token_to_rep_atom": (first + last) // 2,
        "frames_idx": frames[None],
    }
    return {name: value[None] for name, value in feats.items()}


def template_feats(feats: dict[str, Tensor], present: tuple[bool, ...]) -> dict[str, Tensor]:
    """The template features of one template per entry of `present`, float64."""
    n, t = feats["asym_id"].shape[1], len(present)
    g = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, t, n, *shape, generator=g).double()

    covered = (torch.rand(1, t, n, generator=g) < 0.7).double()
    covered *= torch.tensor(present, dtype=torch.float64)[:, None]
    return {
        "template_restype": torch.randint(0, 33, (1, t, n), generator=g),
        "template_frame_rot": torch.linalg.qr(normal(3, 3))[0],
        "template_frame_t": 8 * normal(3),
        "template_cb": 8 * normal(3),
        "template_ca": 8 * normal(3),
        "template_mask_cb": covered * (normal() > -1),
        "template_mask_frame": covered * (normal() > -1),
        "template_mask": covered,
        "visibility_ids": torch.where(covered > 0, 1.0, -1.0 - feats["asym_id"][:, None]).double(),
    }


def randomise(module: nn.Module, seed: int = 0, scale: float = 0.3) -> nn.Module:
    """Give every parameter, zero-initialised ones included, random float64 values."""
    g = torch.Generator().manual_seed(seed)
    module = module.double().eval().requires_grad_(False)
    for p in module.parameters():
        p.copy_(torch.randn(p.shape, generator=g) * scale)
    return module


def bare(module: nn.Module) -> nn.Module:
    """The module with its children and attributes but no class of Boltz, thus no Boltz forward.

    Ranks unpickle it without importing Boltz, and nothing can lean on stock's own computation.
    """
    base = next(c for c in type(module).__mro__ if c.__module__.split(".")[0] == "torch")
    out = base.__new__(base)
    out.__dict__.update(module.__dict__)
    out.__dict__["_modules"] = {name: bare(m) for name, m in module.named_children()}
    return out


@contextmanager
def stock_in_double() -> Iterator[None]:
    """Keep stock's explicit `.float()` and new tensors of default dtype in float64."""
    original = torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.Tensor.float = original
        torch.set_default_dtype(torch.float32)


def tile(x: Tensor, layout, junk: float = 7.0) -> Tensor:
    """This rank's tile of a whole pair tensor [B, N, N, ...]; padding holds junk."""
    (r0, r1), (c0, c1) = layout.tile_box()
    whole = x.new_full((x.shape[0], layout.padded, layout.padded, *x.shape[3:]), junk)
    whole[:, : layout.n, : layout.n] = x
    return whole[:, r0:r1, c0:c1].clone()


def shard(x: Tensor, layout, junk: float = 7.0) -> Tensor:
    """This rank's shard of a whole token tensor [B, N, ...]; padding holds junk."""
    lo, hi = layout.shard_span()
    whole = x.new_full((x.shape[0], layout.padded, *x.shape[2:]), junk)
    whole[:, : layout.n] = x
    return whole[:, lo:hi].clone()


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference relative to the largest value; infinite where not finite."""
    if got.shape != want.shape or not torch.isfinite(got).all():
        return float("inf")
    return ((got - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()
