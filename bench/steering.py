"""Memory and time of the atom overlap potential, of one energy and one gradient.

    python -m bench.steering               # writes bench/results/cpu/steering.csv

Atoms lie on a jittered lattice with the density of a protein, in chains of 2,000. Each row is
measured in a process of its own, on one thread; its extra memory is how much the highest resident
size exceeds the one before. A list of all pairs, as stock Boltz makes it, takes `all_pairs_mib` for
its indices alone.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.machine import ROOT, results_folder, write_csv
from bench.timing import MIB

# (side, atoms, samples, angstrom between neighbours)
CASES = (
    ("stock", 8_000, 1, 2.7),
    ("foldcp", 8_000, 1, 2.7),
    ("foldcp", 40_000, 1, 2.7),
    ("foldcp", 40_000, 5, 2.7),
    ("foldcp", 160_000, 1, 2.7),
    ("foldcp", 40_000, 1, 1e3),
)
CHAIN = 2_000
PARAMETERS = {"buffer": 0.225}


def structure(atoms: int, samples: int, spacing: float) -> tuple[dict[str, Tensor], Tensor]:
    """Compact features of carbon atoms, all in one token per chain, and coordinates [M, A, 3]."""
    torch.manual_seed(0)
    side = round(atoms ** (1 / 3) + 0.5)
    lattice = torch.arange(side**3)[:atoms]
    corner = torch.stack((lattice // side**2, lattice // side % side, lattice % side), -1)
    coords = spacing * (corner + 0.2 * torch.randn(samples, atoms, 3))
    feats = dict(
        asym_id=torch.arange(-(-atoms // CHAIN)),
        atom_to_token=torch.arange(atoms) // CHAIN,
        atom_pad_mask=torch.ones(atoms),
        ref_element=torch.full((atoms,), 6),
        connected_chain_index=torch.tensor([[0], [1]]),
    )
    return {key: value[None] for key, value in feats.items()}, coords


def prepare(side: str, feats: dict[str, Tensor]) -> tuple[Callable[..., Tensor], ...]:
    """The functions (energy, gradient) of coordinates."""
    if side == "foldcp":
        from foldcp.boltz.steering.overlap import overlap

        term = overlap(feats, PARAMETERS)
        return lambda x: term.energy(x, {}), lambda x: term.gradient(x, {})
    from boltz.data.const import num_elements
    from boltz.model.potentials.potentials import VDWOverlapPotential
    from torch.nn.functional import one_hot

    stock = VDWOverlapPotential(PARAMETERS)
    feats["atom_to_token"] = one_hot(feats["atom_to_token"])
    feats["ref_element"] = one_hot(feats["ref_element"], num_elements)
    functions = (stock.compute, stock.compute_gradient)
    return tuple(lambda x, f=f: f(x, feats, PARAMETERS) for f in functions)


def worker(side: str, atoms: int, samples: int, spacing: float) -> dict[str, Any]:
    """Evaluate one case; returns the measured columns."""

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB

    torch.set_num_threads(1)
    feats, coords = structure(CHAIN + 500, 1, 2.7)
    for function in prepare(side, {**feats, "connected_chain_index": torch.empty(1, 2, 0).long()}):
        function(coords)  # torch loads what it needs
    feats, coords = structure(atoms, samples, spacing)
    before, start = peak(), time.perf_counter()
    energy, gradient = prepare(side, feats)
    value = float(energy(coords).mean())
    middle = time.perf_counter()
    gradient(coords)
    return dict(
        extra_mib=round(peak() - before, 1),
        energy_s=round(middle - start, 3),
        gradient_s=round(time.perf_counter() - middle, 3),
        energy=round(value, 2),
    )


def measure(side: str, atoms: int, samples: int, spacing: float) -> dict[str, Any]:
    """One row of the table, from a process of its own."""
    case = [side, *(str(x) for x in (atoms, samples, spacing))]
    command = [sys.executable, "-m", "bench.steering", "--worker", *case]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    columns = dict(side=side, atoms=atoms, samples=samples, spacing_angstrom=spacing)
    measured = json.loads(done.stdout.splitlines()[-1])
    return columns | measured | dict(all_pairs_mib=round(8 * atoms * (atoms - 1) / MIB))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", nargs=4, metavar=("SIDE", "ATOMS", "SAMPLES", "SPACING"))
    parser.add_argument("--out", type=Path, default=results_folder(), help="folder of the table")
    options = parser.parse_args()
    if options.worker:
        side, atoms, samples, spacing = options.worker
        print(json.dumps(worker(side, int(atoms), int(samples), float(spacing))))
        return
    rows = [measure(*case) for case in CASES]
    for row in rows:
        print(row)
    write_csv(options.out / "steering.csv", rows)


if __name__ == "__main__":
    main()
