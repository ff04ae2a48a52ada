"""Describe the settings that a document is read for, and the chains found in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

LONGEST = 5  # letters that Boltz keeps of a chain's id and of a residue's code


@dataclass(frozen=True)
class Setting:
    """The model and options that a document is read for.

    Args:
        boltz2: the model, else Boltz-1.
        server: `--use_msa_server`.
        output_format: `--output_format`.
        has_residue: tells whether Boltz's cache has a molecule of this code; None: not asked.
        fasta: the document is a FASTA file.
    """

    boltz2: bool = True
    server: bool = False
    output_format: str = "mmcif"
    has_residue: Callable[[str], bool] | None = None
    fasta: bool = False


@dataclass
class Chain:
    """One chain; copies of an entity are chains of their own.

    Args:
        id: id as written.
        kind: kind as written.
        line: of its entity.
        residues: names, None where Boltz's cache is asked; empty if the sequence is not usable.
        entity: number of its entity in Boltz.
    """

    id: str
    kind: str
    line: int
    residues: list[str | None] = field(default_factory=list)
    entity: int = -1
