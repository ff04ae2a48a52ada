"""Fold a complex that stock Boltz-2 has no memory for: four chains, 1,536 tokens, 2x2 CPU ranks.

    python -m bench.large_run                  # bench/results/cpu/large_run.csv
    python -m bench.large_run --sides foldcp --tokens 512

The chains have the proportions of the 3,605-residue complex that Fold-CP publishes. Weights are
untrained, of size "tiny", and the trunk has `--blocks` of its 64 blocks: depth adds time, no
memory. Each side is the whole of `boltz predict` in float32. Memory is what all processes of a side
hold together at its highest (proportional set size); a side that holds more than `--limit` is ended
and says "over".
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.machine import ROOT, write_csv
from bench.stock import with_precision_32
from bench.synthetic import make_cache
from bench.synthetic.alignment import LETTERS, write_a3m
from foldcp.cli.similarity import rmsd, superposed

OUT = ROOT / "bench" / "results" / "cpu" / "large_run.csv"
SIDES = ("foldcp", "stock")
CHAINS = (2102, 858, 521, 124)  # residues of Fold-CP's complex
OPTIONS = "--accelerator cpu --num_workers 0 --recycling_steps 0 --seed 1 --diffusion_samples 1"
GIB, POLL = 1 << 30, 0.2  # seconds


def lengths(tokens: int) -> list[int]:
    """Share tokens out to the chains in the proportions of `CHAINS`.

    Args:
        tokens: N, one for each chain at least.
    """
    found = [max(1, tokens * n // sum(CHAINS)) for n in CHAINS[1:]]
    return [tokens - sum(found), *found]


def write_input(folder: Path, tokens: int, rows: int) -> Path:
    """Write four proteins of random sequence with an alignment each.

    Args:
        folder: for the YAML and the alignments.
        tokens: N.
        rows: of each alignment.

    Returns:
        The YAML.
    """
    draw, lines = random.Random(0), ["version: 1", "sequences:"]
    for name, length in zip("ABCD", lengths(tokens), strict=True):
        sequence = "".join(draw.choices(LETTERS, k=length))
        a3m = write_a3m(folder / f"{name}.a3m", sequence, rows)
        lines.append(f"- protein: {{id: {name}, sequence: {sequence}, msa: {a3m}}}")
    path = folder / "complex.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def measure(side: str, folder: Path, path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Fold with one side and return its row.

    Args:
        side: "foldcp" or "stock".
        folder: with the cache; gets the results and logs.
        path: of the input.
        options: of the command line.

    Raises:
        RuntimeError: a process failed.
    """
    rows, cols = (int(x) for x in options.mesh.split("x"))
    world = rows * cols if side == "foldcp" else 1
    command = [sys.executable, "-m", "bench.large_run", "--blocks", str(options.blocks), "--worker"]
    command += ["predict", str(path), *OPTIONS.split(), "--sampling_steps", str(options.steps)]
    command += ["--cache", str(folder / "cache"), "--out_dir", str(folder / side)]
    start, logs = time.perf_counter(), [folder / f"{side}_{rank}.log" for rank in range(world)]
    children = []
    for rank, log in enumerate(logs):
        env = {k: v for k, v in os.environ.items() if not k.startswith("FOLDCP")}
        env |= {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // world))}
        if side == "foldcp":
            env |= {"FOLDCP": "1", "FOLDCP_MESH": options.mesh, "FOLDCP_PRECISION": "fp32"}
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000)}
        with log.open("wb") as stream:
            children.append(subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=stream, stderr=subprocess.STDOUT
            ))  # fmt: skip
    peak = _watch(children, options.limit * GIB)
    row = {
        "side": side, "tokens": options.tokens, "mesh": options.mesh if world > 1 else "1x1",
        "blocks": options.blocks, "sampling_steps": options.steps, "rows": options.rows,
        "peak_gib": round(peak / GIB, 2), "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip
    if peak > options.limit * GIB:
        return row | {"status": "over"}
    if any(child.returncode for child in children):
        ends = "\n".join(log.read_text(errors="replace")[-3000:] for log in logs)
        raise RuntimeError(f"{side} ended with {[c.returncode for c in children]}:\n{ends}")
    return row | {"status": "ok"}


def _watch(children: Sequence[subprocess.Popen[bytes]], limit: float) -> int:
    """Wait for processes; return the most bytes that they held together, or end them above it."""
    peak = 0
    while any(child.poll() is None for child in children):
        peak = max(peak, sum(_held(child.pid) for child in children))
        failed = any(child.returncode for child in children)
        if peak > limit or failed:
            time.sleep(0 if peak > limit else 5)
            for child in children:
                child.send_signal(signal.SIGKILL)
        time.sleep(POLL)
    return peak


def _held(pid: int) -> int:
    """Return the proportional set size of a process in bytes; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(x.split()[1]) * 1024 for x in lines if x.startswith("Pss:"))


def worker(blocks: int, argv: list[str]) -> None:
    """Run Boltz's command line in this process, in float32 and with a trunk of few blocks.

    Args:
        blocks: of the trunk.
        argv: Boltz's arguments.
    """
    import boltz.main as main

    main.Trainer = with_precision_32(main.Trainer)
    main.PairformerArgsV2 = partial(main.PairformerArgsV2, num_blocks=blocks)
    load = main.Boltz2.load_from_checkpoint
    # The checkpoint has the blocks of the trunk that are left out.
    main.Boltz2.load_from_checkpoint = lambda *a, **o: load(*a, **{**o, "strict": False})
    if os.environ.get("FOLDCP") == "1":
        from foldcp.boltz import switch

        switch.patch(main)
    sys.argv = ["boltz", *argv]
    main.cli.main()


def coordinates(folder: Path) -> np.ndarray:
    """Read the predicted atoms [A, 3] of a side.

    Args:
        folder: its results.
    """
    (path,) = folder.glob("boltz_results_*/predictions/*/*_model_0.cif")
    lines = path.read_text().splitlines()
    columns = [x.split(".")[1].strip() for x in lines if x.startswith("_atom_site.")]
    at = [columns.index(f"Cartn_{axis}") for axis in "xyz"]
    atoms = [x.split() for x in lines if x.startswith(("ATOM", "HETATM"))]
    return np.array([[float(atom[i]) for i in at] for atom in atoms])


def main(argv: Sequence[str] | None = None) -> int:
    """Fold with the sides and write the table; 1 when foldcp does not fit or is off stock."""
    parser = argparse.ArgumentParser(prog="python -m bench.large_run", description=__doc__)
    parser.add_argument("--tokens", type=int, default=1536)
    parser.add_argument("--mesh", default="2x2")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="of the sampler")
    parser.add_argument("--rows", type=int, default=64, help="of the alignments")
    parser.add_argument("--limit", type=float, default=20, help="GiB")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--worker", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        worker(options.blocks, options.worker)
        return 0
    found = []
    with tempfile.TemporaryDirectory(prefix="large_run_") as name:
        folder = Path(name)
        make_cache(folder / "cache", "tiny")
        path = write_input(folder, options.tokens, options.rows)
        for side in options.sides:
            found.append(measure(side, folder, path, options))
            print(", ".join(f"{k} {v}" for k, v in found[-1].items()), flush=True)
        off = float("nan")
        if len(found) > 1 and all(row["status"] == "ok" for row in found):
            ours, stock = (coordinates(folder / side) for side in SIDES)
            off = rmsd(superposed(ours, stock), stock) / rmsd(stock, stock.mean(0))
            print(f"RMSD of the two structures: {off:.1e} of their size")
    write_csv(options.out, [row | {"rmsd_of_size": f"{off:.1e}"} for row in found])
    return int(found[0]["status"] != "ok" or off > 1e-3)


if __name__ == "__main__":
    sys.exit(main())
