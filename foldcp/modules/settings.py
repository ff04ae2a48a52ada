"""Say what is asked of a prediction (Boltz's options), and which optional parts a model has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from foldcp.modules.trunk.pair_embedding import ContactOptions

Features = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Settings of one prediction (Boltz's own options).

    Args:
        recycling_steps: passes of the trunk after the first.
        sampling_steps: of the sampler.
        diffusion_samples: structures.
        max_parallel_samples: structures that are sampled at once, None for all.
        keep_z: hand out the pair representation.
        errors: matrices of expected errors that are handed out.
    """

    recycling_steps: int
    sampling_steps: int
    diffusion_samples: int
    max_parallel_samples: int | None = None
    keep_z: bool = False
    errors: tuple[str, ...] = ("pae", "pde")


@dataclass(frozen=True)
class Parts:
    """Optional parts of a model.

    Args:
        confidence: it rates its structures.
        templates: its trunk reads templates.
        bfactor: it predicts B-factors.
        bond_types: its pair input knows the types of bonds.
        contacts: its pair input knows contact constraints, with these distances; None: it does not.
        rating_trunk: its confidence module has an MSA module and a trunk of its own.
    """

    confidence: bool = True
    templates: bool = False
    bfactor: bool = False
    bond_types: bool = False
    contacts: ContactOptions | None = None
    rating_trunk: bool = False
