"""A larger chain in one process, with stock Boltz and with foldcp: time, memory, agreement."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench import cpu_vs_stock
from bench.cpu_vs_stock import MIB
from foldcp.cli.similarity import rmsd, superposed

# Two sampling steps make no structure, but the same cloud of atoms: what rounding moves grows with
# its size. Seen: 2e-7.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Fold:
    """One side.

    Args:
        seconds: of the prediction alone.
        layer_seconds: of one layer of the trunk.
        process_seconds: of the whole process.
        peak_bytes: memory that the prediction adds to that of the loaded model.
        coords: [atoms, 3], angstrom.
    """

    seconds: float
    layer_seconds: float
    process_seconds: float
    peak_bytes: float
    coords: np.ndarray


def fold(side: str, work: Path, tokens: int, threads: int) -> Fold:
    """Fold a made-up chain in a process of its own.

    Args:
        side: "stock" or "foldcp".
        work: folder for what is kept between runs, and for the coordinates.
        tokens: residues of the chain.
        threads: of the process.

    Raises:
        RuntimeError: the run failed.
    """
    work.mkdir(parents=True, exist_ok=True)
    chain = cpu_vs_stock.write_input(work / f"chain{tokens}.yaml", tokens)
    coords = work / f"{side}.npy"
    start = time.perf_counter()
    found = cpu_vs_stock.run(side, str(work), chain, threads, coords)
    return Fold(
        seconds=found["seconds"],
        layer_seconds=found["stages"]["pairformer"][0] / cpu_vs_stock.BLOCKS,
        process_seconds=time.perf_counter() - start,
        peak_bytes=found["peak_mib"] * MIB,
        coords=np.load(coords),
    )


def apart(ours: np.ndarray, stock: np.ndarray) -> float:
    """Tell how far two clouds of atoms [atoms, 3] are apart: RMSD as a share of their size.

    Returns:
        The share; NaN where a coordinate is.
    """
    return rmsd(superposed(ours, stock), stock) / rmsd(stock, stock.mean(0))
