"""Show on a CPU what foldcp does: the structure of stock Boltz, in less memory: `make demo`.

Ubiquitin is folded by stock Boltz and by foldcp on several processes, and both structures are
compared and drawn; a larger chain is folded by both in one process, for time and memory; then
follows what GPUs would need. Ends with 1 when the structures differ, 2 when a run failed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from bench import cpu_vs_stock
from bench.demo import larger, overlay, predicted, runs, weights, words
from bench.machine import ROOT
from foldcp.cli.compare import compare
from foldcp.output.results import read

INPUT = ROOT / "examples" / "inputs" / "ubiquitin.yaml"
WORK = ROOT / ".demo"
LAYERS = 64  # of the trunk that `boltz predict` runs
T = TypeVar("T")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.

    Returns:
        0 when both sides agree, 1 when they differ beyond tolerance, 2 when a run failed.
    """
    options = _parse(argv)
    start, cores = time.perf_counter(), len(os.sched_getaffinity(0))
    try:
        differ = same_structure(options, cores)
        if options.tokens:
            differ += less_memory(options.tokens, cores)
    except (RuntimeError, OSError, ValueError) as error:  # UserError is a RuntimeError
        print(f"\ndemo failed: {error}", file=sys.stderr)
        return 2
    on_gpus()
    files()
    minutes, rest = divmod(round(time.perf_counter() - start), 60)
    print(f"\n   {minutes} min {rest} s in all")
    if differ:
        print(f"\nDIFFERENT: {'; '.join(differ)}")
        return 1
    print("\nSAME: foldcp gave the structure that stock Boltz gave")
    return 0


def same_structure(options: argparse.Namespace, cores: int) -> list[str]:
    """Fold ubiquitin on both sides, compare and draw.

    Args:
        options: of the command line.
        cores: of this machine that may be used.

    Returns:
        What is not the same, in words.
    """
    ranks, mesh = options.nproc, options.mesh
    ours_name = f"foldcp, {ranks} ({mesh})"
    print("\n1  Does foldcp give the structure that Boltz gives? Human ubiquitin, 76 residues\n")
    cache, chosen = options.cache, f"Weights: from {options.cache}."
    if cache is None:
        cache, chosen = weights.choose_cache(WORK, options.size, ranks)
    print(f"   foldcp splits one fold over {ranks} processes here (on GPUs: one process for each); "
          "each holds its\n   part of what grows with the square of the length. Both sides compute "
          "in float32; stock Boltz\n   by itself would take bfloat16 on a CPU.\n")  # fmt: skip
    print("   " + chosen.replace("\n", "\n   ") + "\n", flush=True)
    arguments = [
        str(INPUT), "--cache", str(cache), "--accelerator", "cpu", "--override",
        "--recycling_steps", str(options.recycling), "--sampling_steps", str(options.steps),
        "--seed", str(options.seed), "--num_workers", "0",
    ]  # fmt: skip
    stock = _timed("stock Boltz, 1 process", lambda: runs.stock(WORK, arguments, cores))
    threads = max(1, cores // ranks)
    ours = _timed(f"foldcp, {ranks} processes ({mesh})",
                  lambda: runs.foldcp(WORK, arguments, ranks, mesh, threads))  # fmt: skip
    mine, other = read(ours.prediction), read(stock.prediction)
    found = compare(mine, other)
    names = (f"foldcp on {ranks} processes ({mesh})", "stock Boltz")
    overlay.draw(mine, other, WORK / "overlay.png", names)
    both = [(x.scores, run) for x, run in ((other, stock), (mine, ours))]
    print()
    print(words.line("", "stock Boltz", ours_name))
    print(words.line("mean pLDDT (0 to 100)", *(f"{100 * s['plddt'].mean():.2f}" for s, _ in both)))
    print(words.line("pTM (0 to 1)", *(f"{s['ptm'][0]:.4f}" for s, _ in both)))
    print(words.line("time, start-up included", *(words.seconds(r.seconds) for _, r in both)))
    print(words.line("peak memory of a process", *(words.gigabytes(r.peak_bytes) for _, r in both)))
    print("\n" + words.how_alike(found))
    print(f"   ({ranks} processes share {cores} cores here, and Python and torch take most of the "
          "memory of so\n   small a protein: see 2 and 3 for what foldcp saves)")  # fmt: skip
    return [f"ubiquitin, {what}" for what in words.apart(found)]


def less_memory(tokens: int, cores: int) -> list[str]:
    """Fold a larger chain in one process on both sides; print time and memory.

    Args:
        tokens: residues.
        cores: of this machine that may be used.

    Returns:
        What is not the same, in words.
    """
    print(f"\n2  What does it save in one process? A made-up chain of {tokens} residues\n")
    print(f"   Boltz-2 in its real width with {cpu_vs_stock.BLOCKS} of its {LAYERS} layers and 2 "
          "sampling steps, untrained, so that it\n   ends soon. More layers take more time, not "
          "more memory: with all of them the ratio of the times\n   comes near that of one layer."
          "\n", flush=True)  # fmt: skip
    stock, ours = (
        _timed(name, lambda s=side: larger.fold(s, WORK / "larger", tokens, cores))
        for side, name in (("stock", "stock Boltz"), ("foldcp", "foldcp"))
    )
    print()
    print(words.line("", "stock Boltz", "foldcp", "of stock"))
    for name, shown, key in (
        ("folding", words.seconds, "seconds"),
        ("one layer of the trunk", words.seconds, "layer_seconds"),
        ("time, start-up included", words.seconds, "process_seconds"),
        ("memory that folding adds", words.gigabytes, "peak_bytes"),
    ):
        a, b = getattr(stock, key), getattr(ours, key)
        print(words.line(name, shown(a), shown(b), f"{b / a:.2f}x"))
    away = larger.apart(ours.coords, stock.coords)
    print(f"\n   RMSD of the {len(ours.coords):,} atoms: {away:.1g} of the size of the whole "
          f"({larger.TOLERANCE:g} allowed)")  # fmt: skip
    if away <= larger.TOLERANCE:
        return []
    return [f"chain of {tokens} residues, atom positions differ by {away:.2g} of its size"]


def on_gpus() -> None:
    """Print what a GPU would need, by the model."""
    found, largest = predicted.memory(), predicted.largest()
    meshes = list(largest)
    sizes = [r * c for r, c in (map(int, mesh.split("x")) for mesh in meshes)]
    print("\n3  What would a GPU need? Predicted, not measured: a model that counts every tensor\n")
    print(words.line("memory of each GPU, for",
                     *(f"{n} GPU{'s' * (n > 1)}{f' ({m})' * (n > 1)}"
                       for n, m in zip(sizes, meshes, strict=True))))  # fmt: skip
    for tokens, row in found.items():
        cells = [words.gigabytes(row[mesh], 1) for mesh in meshes]
        print(words.line(f"  {tokens:,} residues", *cells))
    print(words.line("most residues in 80 GB", *(
        f"about {round(largest[mesh], -2):,}" for mesh in meshes)))  # fmt: skip
    print("   (weights of 2 GB included; one sample, no alignment, bfloat16; the last line is "
          "extrapolated)")  # fmt: skip


def files() -> None:
    """Print where everything is."""
    stem = INPUT.stem
    structures = [
        shown(WORK / side / f"boltz_results_{stem}" / "predictions" / stem)
        for side in ("stock", "foldcp")
    ]
    print("\n4  Where is it all?\n")
    print(f"   picture of both structures      {shown(WORK / 'overlay.png')}")
    print(f"   structure of stock Boltz        {structures[0]}/{stem}_model_0.cif")
    print(f"   structure of foldcp             {structures[1]}/{stem}_model_0.cif")
    print(f"   confidences                     beside them; what both said: {shown(WORK)}/*.log")
    print(f"   compare them again, in detail   .venv/bin/foldcp compare {shown(WORK / 'foldcp')} "
          f"{shown(WORK / 'stock')}")  # fmt: skip


def shown(path: Path) -> str:
    """Return a path as one types it in the clone."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _timed(name: str, work: Callable[[], T]) -> T:
    """Print what runs before it runs, and how long it took after it."""
    print(f"   {name:<{words.FIRST}} ", end="", flush=True)
    start = time.perf_counter()
    found = work()
    print(words.seconds(time.perf_counter() - start), flush=True)
    return found


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.demo", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--cache", type=Path, help="Boltz cache to use as it is")
    parser.add_argument("--size", choices=("tiny", "real"),
                        help="untrained weights of this size, not Boltz's own")  # fmt: skip
    parser.add_argument("--nproc", type=int, default=4, help="processes of foldcp (4)")
    parser.add_argument("--mesh", default="2x2", help="their arrangement, rows x columns (2x2)")
    parser.add_argument("--recycling", type=int, default=1, help="recycling steps (1)")
    parser.add_argument("--steps", type=int, default=25, help="sampling steps (25)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=384,
                        help="residues of the larger chain; 0: leave it out (384)")  # fmt: skip
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
