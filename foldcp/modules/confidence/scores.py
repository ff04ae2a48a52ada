"""Scores of a predicted structure: pTM and its interface forms, frames, interface weights.

Everything here is O(N) or O(N x chains) and the same on every rank; what needs all pairs arrives
as sums over columns (`foldcp.modules.confidence.heads`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from foldcp.fabric.exchange.autograd import fetch
from foldcp.fabric.mesh import Mesh
from foldcp.layout.plans import slots_plan
from foldcp.layout.tiles import PairLayout
from foldcp.modules.confidence.ratings import TMScores
from foldcp_kernels.core.chunking import chunk_length, spans

Feats = Mapping[str, Tensor]

PROTEIN, NONPOLYMER = 0, 3  # Boltz's numbers of chain types
CONTACT = 8.0  # angstrom between representative atoms of an interface
EPS = 1e-5
_COLLINEAR = 0.9063  # cosine of 25 degrees
_EXPANDED_FROM = 25  # points from which torch.cdist expands |x - y|^2, as stock's call does


def distances(x: Tensor, y: Tensor, points: int) -> Tensor:
    """Compute distances [.., I, J] between points [.., I, 3] and [.., J, 3], in angstrom.

    A part of a distance matrix must round as the whole does in stock: `points`, the size of the
    whole, selects the formula that `torch.cdist` would select for it.

    Args:
        x: [.., I, 3], angstrom.
        y: [.., J, 3], angstrom.
        points: number of points that decides on the algorithm, as in stock.
    """
    expanded = points > _EXPANDED_FROM
    mode = "use_mm_for_euclid_dist" if expanded else "donot_use_mm_for_euclid_dist"
    return torch.cdist(x, y, compute_mode=mode)


@dataclass(frozen=True)
class ColumnGroups:
    """Tokens grouped by (chain, molecule type): what column sums are kept apart by.

    Args:
        group: group of each token [N].
        asym: chain of each group [G].
        kind: its molecule type [G].
        pad_mask: 1 for real tokens [N].
        chains: chain identifiers, sorted.
    """

    group: Tensor
    asym: Tensor
    kind: Tensor
    pad_mask: Tensor
    chains: tuple[int, ...]

    @classmethod
    def of(cls, feats: Feats, dtype: torch.dtype) -> ColumnGroups:
        """Make the groups of one sample; one host sync.

        Args:
            feats: collated compact features.
            dtype: of the groups' tensors.
        """
        asym = feats["asym_id"][0]
        pairs = torch.stack([asym, feats["mol_type"][0]])
        kinds, group = torch.unique(pairs, dim=1, return_inverse=True)
        chains = tuple(torch.unique(asym).tolist())
        asym, kind = kinds.contiguous()
        return cls(group, asym, kind, feats["token_pad_mask"][0].to(dtype), chains)

    def members(self, span: tuple[int, int]) -> Tensor:
        """Mark members, [tokens of the span, G]: 1 where a real token belongs to a group."""
        lo, hi = span
        one = self.group.new_tensor(range(len(self.asym)))
        return (self.group[lo:hi, None] == one) * self.pad_mask[lo:hi, None]

    def counts(self) -> Tensor:
        """Count the real tokens of each group, [G]."""
        return self.pad_mask.new_zeros(len(self.asym)).index_add(0, self.group, self.pad_mask)


def row_totals(partial: Tensor, layout: PairLayout, mesh: Mesh) -> Tensor:
    """Add up partial results over the columns of each rank, on every rank.

    Args:
        partial: [T_r, K], over this rank's columns.
        layout: the tiling.
        mesh: the mesh.

    Returns:
        [Q, N, K], one entry per mesh column, identical on every rank.
    """
    plan = slots_plan(layout.size, layout.rank)
    (slots,) = fetch(mesh, plan, (partial.contiguous()[None],), ((0,),), "scores")
    by_rank = slots.unflatten(0, (layout.mesh_rows, layout.mesh_cols)).transpose(0, 1)
    return by_rank.flatten(1, 2)[:, : layout.n]


def tm_scores(tm_sums: Tensor, groups: ColumnGroups, frames: Tensor) -> TMScores:
    """Compute pTM, ipTM, their ligand and protein forms, and the score of every chain pair.

    Args:
        tm_sums: expected TM score summed over the columns of each group [N, G].
        groups: the groups.
        frames: 1 where the token's predicted frame is valid [N].

    Returns:
        The scores of one sample.

    Source: AlphaFold 3 supplement, section 5.9.1.
    """
    rows = frames * groups.pad_mask
    counts = groups.counts()
    row_asym, row_kind = groups.asym[groups.group], groups.kind[groups.group]
    other = row_asym[:, None] != groups.asym  # [N, G]
    row_protein, row_ligand = row_kind[:, None] == PROTEIN, row_kind[:, None] == NONPOLYMER
    protein, ligand = groups.kind == PROTEIN, groups.kind == NONPOLYMER
    across = (row_ligand & protein) | (row_protein & ligand)

    def best(chosen: Tensor) -> Tensor:
        mask = chosen * rows[:, None]
        return ((tm_sums * mask).sum(-1) / ((mask * counts).sum(-1) + EPS)).amax(0, keepdim=True)

    return TMScores(
        ptm=best(torch.ones_like(other)),
        iptm=best(other),
        ligand_iptm=best(other & across),
        protein_iptm=best(other & (row_protein & protein)),
        pair_chains_iptm=_chain_pairs(tm_sums, groups, rows),
    )


def _chain_pairs(
    tm_sums: Tensor, groups: ColumnGroups, rows: Tensor
) -> dict[int, dict[int, Tensor]]:
    number = len(groups.chains)
    chains = groups.asym.new_tensor(groups.chains)
    chain = torch.searchsorted(chains, groups.asym)  # [G]
    sums = tm_sums.new_zeros(len(tm_sums), number).index_add(1, chain, tm_sums)
    counts = sums.new_zeros(number).index_add(0, chain, groups.counts())
    value = sums * rows[:, None] / (rows[:, None] * counts + EPS)  # [N, chains]
    of_row = chain[groups.group][:, None].expand_as(value)
    best = sums.new_zeros(number, number).scatter_reduce(0, of_row, value, "amax")
    return {
        a: {b: best[j, i : i + 1] for j, b in enumerate(groups.chains)}
        for i, a in enumerate(groups.chains)
    }


@dataclass(frozen=True)
class Ligand:
    """One ligand chain whose frames follow the prediction: first token, first atom, its atoms."""

    token: int
    atom: int
    atoms: Tensor


def ligands(feats: Feats) -> list[Ligand]:
    """Find the ligand chains of three or more atoms, once per sample (host syncs).

    Chains are walked in the order of their identifiers, as stock does: a chain's first token and
    first atom are the sums of the sizes of those before it.
    """
    asym, kind = feats["asym_id"][0], feats["mol_type"][0].tolist()
    real = feats["atom_pad_mask"][0].bool()
    of_atom = asym[feats["atom_to_token"][0]]
    found, token, atom = [], 0, 0
    for chain in torch.unique(asym).tolist():
        tokens = int(((asym == chain) * feats["token_pad_mask"][0]).sum())
        atoms = ((of_atom == chain) & real).nonzero()[:, 0]
        if token < len(kind) and kind[token] == NONPOLYMER and len(atoms) >= 3:
            found.append(Ligand(token, atom, atoms))
        token, atom = token + tokens, atom + len(atoms)
    return found


def frame_mask(x: Tensor, feats: Feats, chains: list[Ligand]) -> Tensor:
    """Return the mask of tokens with a valid frame in the predicted structure.

    Args:
        x: predicted coordinates [A, 3] in angstrom.
        feats: collated compact features.
        chains: from `ligands`; the frame of a ligand atom is made of its two nearest neighbours.

    Returns:
        [N], 1 where the three atoms are neither collinear nor overlapping.

    Raises:
        ValueError: `frames_idx` holds more than one conformer.

    Source: AlphaFold 3 supplement, section 4.3.2.
    """
    n = feats["asym_id"].shape[1]
    index = feats["frames_idx"].reshape(-1, n, 3)
    if len(index) != 1:
        raise ValueError(
            f"`frames_idx` holds {len(index)} conformers; expected 1: featurise one conformer"
        )
    index = index[0].clone()
    for ligand in chains:
        size = len(ligand.atoms)
        if ligand.token + size <= n:
            nearest = _nearest(x[ligand.atoms]) + ligand.atom
            index[ligand.token : ligand.token + size] = nearest[:, [1, 0, 2]]
    a, b, c = x[index].unbind(1)
    valid = _independent(a - b, c - b)
    return valid * feats["token_pad_mask"][0]


def _nearest(x: Tensor) -> Tensor:
    """The three nearest atoms of each atom, itself first, [a, 3]."""
    parts = []
    for lo, hi in spans(len(x), chunk_length(len(x), 16 * len(x) * x.element_size(), x.device)):
        d = ((x[lo:hi, None] - x) ** 2).sum(-1) ** 0.5
        parts.append(d.sort(-1).indices[:, :3])
    return torch.cat(parts)


def _independent(u: Tensor, v: Tensor) -> Tensor:
    lengths = [w.norm(dim=1, keepdim=True) for w in (u, v)]
    u, v = (w / (length + 1e-6) for w, length in zip((u, v), lengths, strict=True))
    apart = (lengths[0] > 1e-2) & (lengths[1] > 1e-2)
    return ((u * v).sum(1).abs() < _COLLINEAR) & apart[:, 0]


@dataclass(frozen=True)
class InterfaceWeights:
    """Weights of ligands, of other interfaces and of the rest in the interface-weighted pLDDT.

    `floor` is added to the sum of weights, so that a complex without interface has a score.
    """

    ligand: float = 20.0
    interface: float = 10.0
    other: float = 1.0
    floor: float = 0.0


def interface_plddt(
    plddt: Tensor,
    mask: Tensor,
    ligand: Tensor,
    interface: Tensor,
    weights: InterfaceWeights = InterfaceWeights(),
) -> tuple[Tensor, Tensor]:
    """Compute the mean pLDDT and its interface-weighted form.

    Args:
        plddt: [L] over tokens or atoms.
        mask: 1 where real [L].
        ligand: bool [L].
        interface: bool [L], within 8 angstrom of another chain.
        weights: of each kind.

    Returns:
        (complex_plddt, complex_iplddt), [1] each.
    """
    near = torch.where(interface, weights.interface, weights.other)
    weight = torch.where(ligand, weights.ligand, near).to(mask.dtype) * mask
    mean = (plddt * mask).sum() / mask.sum()
    return mean[None], ((plddt * weight).sum() / (weight.sum() + weights.floor))[None]


def atom_interface(x: Tensor, chain: Tensor, layout: PairLayout, mesh: Mesh) -> Tensor:
    """Return the mask of atoms within 8 angstrom of another chain, its rows shared by the ranks.

    Args:
        x: coordinates [A, 3] in angstrom.
        chain: [A].
        layout: the tiling.
        mesh: the mesh.

    Returns:
        bool [A], identical on every rank.
    """
    total = len(x)
    share = -(-total // layout.size)
    start = min(layout.rank * share, total)
    mine = x.new_zeros(share)
    stop = min(start + share, total)
    for lo, hi in spans(stop - start, chunk_length(share, 16 * total, x.device)):
        rows = slice(start + lo, start + hi)
        near = distances(x[rows], x, total) < CONTACT
        mine[lo:hi] = (near & (chain[rows, None] != chain)).any(-1)
    plan = slots_plan(layout.size, layout.rank)
    (all_atoms,) = fetch(mesh, plan, (mine[None],), ((0,),), "scores")
    return all_atoms.flatten()[:total] > 0
