"""Prepare Boltz's steering potentials from compact features, each once for a sample.

Every function returns the term of one potential, or None where an input has nothing for it.
"""

from __future__ import annotations

from math import inf, pi

import torch
from boltz.data import const
from torch import Tensor

from foldcp.boltz.steering.terms import (
    ChainCentres,
    Contacts,
    Dihedrals,
    Distances,
    Features,
    Parameters,
    TemplateDeviations,
    Term,
    UnsignedDihedrals,
)  # fmt: skip


def vdw_radii(feats: Features) -> Tensor:
    """Return the radius of each atom in angstrom, float [A]; 0 for padding and unknown ones."""
    element = feats["ref_element"][0]
    table = torch.zeros(const.num_elements, dtype=torch.float32, device=element.device)
    known = torch.tensor(const.vdw_radii, dtype=torch.float32, device=element.device)
    table[1 : len(known) + 1] = known
    return table[element] * feats["atom_pad_mask"][0].bool()


def chain_of_atom(feats: Features) -> Tensor:
    """Return the chain of each atom, long [A]; 0 for padding, as in stock."""
    chain = feats["asym_id"][0, feats["atom_to_token"][0]]
    return torch.where(feats["atom_pad_mask"][0].bool(), chain, 0)


def chain_centres(feats: Features, parameters: Parameters) -> Term | None:
    """Keep copies of a chain of more than one atom apart.

    Args:
        feats: compact features, collated.
        parameters: of the potential, by Boltz's names.
    """
    chain, real = chain_of_atom(feats), feats["atom_pad_mask"][0].nonzero()[:, 0]
    size = torch.bincount(chain[real], minlength=int(feats["asym_id"].max()) + 1)
    pairs = feats["symmetric_chain_index"][0]
    pairs = pairs[:, (size > 1)[pairs].all(0)]
    return ChainCentres(pairs, chain, real) if pairs.shape[1] else None


def connections(feats: Features, parameters: Parameters) -> Term | None:
    """Keep atoms close that are bonded across chains.

    Args:
        feats: compact features, collated.
        parameters: of the potential, by Boltz's names.
    """
    index = feats["connected_atom_index"][0]
    return Distances(index, upper=parameters["buffer"]) if index.shape[1] else None


def ligand_bounds(feats: Features, parameters: Parameters) -> Term | None:
    """Bound distances within a ligand, by RDKit's distance geometry and PoseBusters' checks.

    Args:
        feats: compact features, collated.
        parameters: of the potential, by Boltz's names.
    """
    index = feats["rdkit_bounds_index"][0]
    if not index.shape[1]:
        return None
    lower, upper = feats["rdkit_lower_bounds"][0], feats["rdkit_upper_bounds"][0]
    bond, angle = feats["rdkit_bounds_bond_mask"][0], feats["rdkit_bounds_angle_mask"][0]
    either = bond | angle
    slack = [parameters[f"{name}_buffer"] for name in ("bond", "angle", "clash")]
    slack = torch.where(bond & angle, min(slack[:2]), torch.where(bond, slack[0], slack[1]))
    slack = slack.to(lower.dtype)
    below = torch.where(either, slack, parameters["clash_buffer"])
    lower = lower * (1 - below)
    upper = torch.where(either, upper * (1 + slack), inf)
    touch = 0.35 + vdw_radii(feats)[index].mean(0)
    lower = torch.where(bond, lower, torch.maximum(lower, touch))
    upper = torch.where(bond, torch.minimum(upper, touch), upper)
    return Distances(index, lower, upper)


def chiral_atoms(feats: Features, parameters: Parameters) -> Term | None:
    """Keep the handedness of stereo centres of ligands.

    Args:
        feats: compact features, collated.
        parameters: of the potential, by Boltz's names.
    """
    index, buffer = feats["chiral_atom_index"][0], parameters["buffer"]
    positive = feats["chiral_atom_orientations"][0].bool()
    lower, upper = torch.where(positive, buffer, -inf), torch.where(positive, inf, -buffer)
    return Dihedrals(index, lower, upper) if index.shape[1] else None


def stereo_bonds(feats: Features, parameters: Parameters) -> Term | None:
    """Keep double bonds of ligands on their side: cis near 0, trans near pi.

    Args:
        feats: compact features, collated.
        parameters: of the potential, by Boltz's names.
    """
    index, buffer = feats["stereo_bond_index"][0], parameters["buffer"]
    trans = feats["stereo_bond_orientations"][0].bool()
    lower, upper = torch.where(trans, pi - buffer, -inf), torch.where(trans, inf, buffer)
    return UnsignedDihedrals(index, lower, upper) if index.shape[1] else None


def planar_bonds(feats: Features, parameters: Parameters) -> Term | None:
    """Keep the neighbours of both ends of a planar double bond in its plane.

    Args:
        feats: compact features, collated.
        parameters: of the potential, by Boltz's names.
    """
    atoms = feats["planar_bond_index"][0]  # [6, n]
    index = torch.cat((atoms[[1, 2, 3, 0]], atoms[[4, 5, 0, 3]]), dim=1)
    return UnsignedDihedrals(index, upper=parameters["buffer"]) if index.shape[1] else None


def contacts(feats: Features, parameters: Parameters) -> Term | None:
    """Enforce pocket and contact constraints that the input forces.

    Args:
        feats: compact features, collated.
        parameters: of the potential, by Boltz's names.
    """
    index, wanted = feats["contact_pair_index"][0], feats["contact_negation_mask"][0].bool()
    if not index.shape[1]:
        return None
    threshold = feats["contact_thresholds"][0]
    lower, upper = torch.where(wanted, -inf, threshold), torch.where(wanted, threshold, inf)
    return Contacts(index, lower, upper, feats["contact_union_index"][0])


def templates(feats: Features, parameters: Parameters) -> Term | None:
    """Hold the structure near templates that the input forces.

    Args:
        feats: compact features, collated.
        parameters: of the potential, by Boltz's names.
    """
    forced = feats.get("template_force")
    if forced is None or "template_mask_cb" not in feats or not forced.any():
        return None
    names = ("template_cb", "template_mask_cb", "template_force_threshold")
    real, token = feats["atom_pad_mask"][0].bool(), feats["atom_to_token"][0]
    token = torch.where(real, feats["token_index"][0, token], 0)
    chosen = (feats[name][forced] for name in names)
    return TemplateDeviations(*chosen, feats["token_to_rep_atom"][0], token)
