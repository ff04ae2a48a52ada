"""Made-up alignments: the same sequence and seed always give the same file."""

from __future__ import annotations

import random
from pathlib import Path

from bench.synthetic.molecules import AMINO_ACIDS, write_bytes

LETTERS = sorted(AMINO_ACIDS.values())
SUBSTITUTION, GAP, INSERTION = 0.35, 0.08, 0.02  # per residue


def homologues(sequence: str, depth: int, seed: int = 0) -> list[str]:
    """Make aligned relatives of a protein sequence.

    Args:
        sequence: one-letter query of length N.
        depth: number of rows S, the query included.
        seed: seed of the mutations.
    Returns:
        S rows in a3m notation: N upper-case letters or gaps, insertions in lower case.
    """
    draw = random.Random(f"{sequence}/{seed}")
    rows = [sequence]
    while len(rows) < depth:
        row = "".join(_mutate(letter, draw) for letter in sequence)
        if row not in rows:
            rows.append(row)
    return rows


def write_a3m(path: str | Path, sequence: str, depth: int, seed: int = 0) -> Path:
    """Write `homologues` as an a3m file.

    Args:
        path: file to write.
        sequence: one-letter query.
        depth: number of rows, the query included.
        seed: seed of the mutations.
    Returns:
        `path`.
    """
    rows = homologues(sequence, depth, seed)
    text = "".join(f">sequence_{index}\n{row}\n" for index, row in enumerate(rows))
    write_bytes(Path(path), text.encode())
    return Path(path)


def write_paired_csv(
    path: str | Path, sequence: str, depth: int, paired: int, seed: int = 0
) -> Path:
    """Write `homologues` as Boltz's csv, whose keys tell which rows of two chains belong together.

    Args:
        path: file to write.
        sequence: one-letter query.
        depth: number of rows, the query included.
        paired: the first `paired` rows carry a key (their index), the others none.
        seed: seed of the mutations.
    Returns:
        `path`.
    """
    rows = homologues(sequence, depth, seed)
    lines = ["key,sequence"]
    lines += [f"{index if index < paired else -1},{row}" for index, row in enumerate(rows)]
    write_bytes(Path(path), "\n".join(lines).encode() + b"\n")
    return Path(path)


def _mutate(letter: str, draw: random.Random) -> str:
    if draw.random() < GAP:
        return "-"
    if draw.random() < SUBSTITUTION:
        letter = draw.choice(LETTERS)
    inserted = draw.choice(LETTERS).lower() if draw.random() < INSERTION else ""
    return inserted + letter
