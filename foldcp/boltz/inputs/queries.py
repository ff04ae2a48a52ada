"""Alignments that do not fit their chains: what Boltz makes of them is folded, and said.

Boltz takes a row of an alignment from where it begins, as many residues as the chain has. A row
that is too short goes on with the residues of the next one; the last rows, with memory that is not
the alignment's. Boltz-2 uses no alignment at all whose first sequence is not the chain's.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from boltz.data import const
from boltz.data.types import MSA, Record, Structure, StructureV2
from tqdm import tqdm

from foldcp.boltz.inputs.alignments import Alignments
from foldcp.boltz.inputs.msas import unreadable

_FORM = "insertions are lower case, gaps '-'"


def check(
    record: Record, structure: Structure | StructureV2, folder: Path, alignments: Alignments
) -> None:
    """Compare each alignment with its chain, and say on standard error where they differ.

    Args:
        record: of an input that was just read.
        structure: its chains and residues; `StructureV2` for Boltz-2.
        folder: of its processed alignments, numbered in the order in which they were parsed.
        alignments: of the input.

    Raises:
        Unreadable: a row ends where the alignment does, and is too short for the chain.
    """
    differences: dict[tuple[Path, str], list[str]] = {}
    for chain in record.chains:
        if chain.msa_id == -1:
            continue
        path = alignments.read[int(str(chain.msa_id).rpartition("_")[2])]
        msa = MSA.load(folder / f"{chain.msa_id}.npz")
        place = structure.chains[chain.chain_id]
        residues = structure.residues[place["res_idx"] : place["res_idx"] + place["res_num"]]
        wanted = residues["res_type"]
        differs = _first_differs(msa, wanted)
        if differs and isinstance(structure, StructureV2):
            differs = f"is not used for {{}}, as in Boltz: {differs}"
        else:
            rows = _rows_differ(path, msa, len(wanted), chain.chain_name)
            differs = "; ".join(text for text in (differs, rows) if text)
            differs = differs and f"is used for {{}}, as in Boltz, although {differs}"
        if differs:
            differences.setdefault((path, differs), []).append(chain.chain_name)
    for (path, text), chains in differences.items():
        named = f"chain{'s' * (len(chains) > 1)} {', '.join(chains)}"
        # Not print: Boltz shows a progress bar.
        tqdm.write(f"foldcp: the MSA {path} {text.replace('{}', named)}", file=sys.stderr)


def _first_differs(msa: MSA, wanted: np.ndarray) -> str:
    """Say how the first row differs from its chain, with the remedy; "" where Boltz takes it."""
    first = msa.sequences[0]
    query = msa.residues["res_type"][first["res_start"] : first["res_end"]]
    remedy = "put the chain's own sequence first"
    if len(query) != len(wanted):
        return f"its first sequence has {len(query)} residues and the chain {len(wanted)}; {remedy}"
    met, unk = const.token_ids["MET"], const.token_ids["UNK"]
    at = np.flatnonzero(query != wanted)
    # Boltz takes the chain's own residues where one side is unknown.
    known = (wanted[at] == met).all() and (query[at] == unk).all()
    if len(at) == 0 or known or (wanted[at] == unk).all():
        return ""
    mine, theirs = const.tokens[wanted[at[0]]], const.tokens[query[at[0]]]
    return (
        f"its first sequence differs from the chain's in {len(at)} residues (at {at[0] + 1} "
        f"{theirs} instead of {mine}); {remedy}"
    )


def _rows_differ(path: Path, msa: MSA, length: int, chain: str) -> str:
    """Say how Boltz treats rows that are not as long as the chain; "" if all are."""
    start = msa.sequences["res_start"]
    lengths = msa.sequences["res_end"] - start
    past = np.flatnonzero(start + length > len(msa.residues))
    if len(past):
        row = int(past[0])
        raise unreadable(
            path,
            f"sequence {row + 1} has {lengths[row]} aligned positions, chain {chain} has {length} "
            f"residues, and Boltz would read memory after the end of the MSA; {_FORM}",
        )
    parts = []
    for wrong, how, what in (
        (lengths < length, "fewer", "fills such a row with the start of the next, which is wrong"),
        (lengths > length, "more", "leaves out what is past the chain's end"),
    ):
        rows = np.flatnonzero(wrong)
        if len(rows):
            have = "has" if len(rows) == 1 else "have"
            parts.append(
                f"{len(rows)} of its {len(lengths)} sequences {have} {how} aligned positions than "
                f"the chain has residues (sequence {rows[0] + 1}: {lengths[rows[0]]}, not "
                f"{length}), and Boltz {what}"
            )
    return f"{'; '.join(parts)}; {_FORM}" if parts else ""
