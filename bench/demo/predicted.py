"""What a GPU would have to hold: a table of what `bench.mesh_memory` counted."""

from __future__ import annotations

import csv
from math import sqrt
from pathlib import Path

from bench.mesh_memory import OUT

GB = 1e9
GPU, USABLE = 80 * GB, 0.9  # of which so much is left by CUDA, NCCL and the allocator's rounding


def memory(path: Path = OUT) -> dict[int, dict[str, float]]:
    """Read the table.

    Returns:
        By tokens, then by mesh ("RxQ"): bytes of a rank, weights included.
    """
    found: dict[int, dict[str, float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(int(row["tokens"]), {})[row["mesh"]] = float(row["bytes_modelled"])
    return found


def largest(path: Path = OUT) -> dict[str, int]:
    """Extrapolate the largest complex that GPUs of 80 GB hold, in tokens by mesh.

    Activations grow with the square of the tokens; those of the largest complex in the table count.
    """
    with path.open(newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: int(row["tokens"]))
    found = {}
    for row in rows:
        left = GPU * USABLE - float(row["weight_bytes"])
        found[row["mesh"]] = int(
            int(row["tokens"]) * sqrt(left / float(row["activation_bytes_modelled"]))
        )
    return found
