"""Memory of a GPU over tokens and meshes: a table of `bench.live_memory`, with the weights.

**Modelled, not measured on a GPU**: live bytes are counted as `bench.live_memory` does, fused
kernels, bfloat16, one sample, no alignment. Weights are those of Boltz-2 in float32, which each
rank holds. Of a mesh, the rank in its middle counts, which has neighbours on all sides.

    python -m bench.mesh_memory                  # bench/results/memory/meshes.csv
    python -m bench.mesh_memory --flat           # bench/results/memory/flat.csv

`--flat` asks whether memory falls as 1/P: every stage of the first, the middle and the last rank
with 1,024 rows of an alignment, in lean memory, and of the middle rank in fast memory, against
`BYTES_PER_PAIR` and `BESIDE`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.machine import ROOT, write_csv

OUT = ROOT / "bench" / "results" / "memory" / "meshes.csv"
TOKENS = (2048, 8192)
MESHES = ((1, 1), (2, 2), (4, 4), (8, 8))
WEIGHTS = 506_724_992 * 4  # bytes
# Largest live bytes of a rank in lean memory, weights apart: of each of its N^2 / P pairs, and
# beside them for what grows with N or not at all (alignment, single track, atoms, chunks).
BYTES_PER_PAIR, BESIDE, SEQUENCES = 1000, 1 << 30, 1024
FLAT = ((3605, 1, 1), (3605, 2, 2), (8192, 2, 4), (8192, 4, 4), (30000, 8, 8), (20000, 16, 16))
STAGES = ("pairformer", "msa", "conditioning", "sampling", "confidence", "overall")


def rank_bytes(tokens: int, rows: int, cols: int) -> int:
    """Count the activations of the middle rank at its peak.

    Args:
        tokens: N.
        rows: rows of the mesh.
        cols: columns of the mesh.

    Returns:
        Bytes, weights apart.
    """
    from foldcp.boltz.families.dry_run.measure import measure

    middle = rows // 2 * cols + cols // 2
    found = measure(tokens, rows, cols, middle, recycles=0, kernels="triton")
    return next(stage.bytes for stage in found if stage.stage == "overall")


def allowed(tokens: int, size: int) -> int:
    """Return the live bytes that a rank may have in lean memory, weights apart.

    Args:
        tokens: N.
        size: P.
    """
    return BYTES_PER_PAIR * tokens**2 // size + BESIDE


def flat_rows(tokens: int, rows: int, cols: int) -> Iterator[dict[str, Any]]:
    """Count the stages of the ranks that `--flat` asks for, one rank after the other.

    Args:
        tokens: N.
        rows: rows of the mesh.
        cols: columns of the mesh.
    """
    from foldcp.boltz.families.dry_run.measure import measure

    size, middle = rows * cols, rows // 2 * cols + cols // 2
    wanted = [("lean", rank) for rank in sorted({0, middle, size - 1})]
    for memory, rank in (*wanted, ("fast", middle)):
        found = measure(
            tokens, rows, cols, rank, 1, SEQUENCES, recycles=1, kernels="triton", memory=memory
        )
        bytes_of = {stage.stage: stage.bytes for stage in found}
        pairs = tokens**2 / size
        yield (
            {"tokens": tokens, "mesh": f"{rows}x{cols}", "rank": rank, "memory": memory}
            | {f"{name}_bytes_per_pair": round(bytes_of[name] / pairs) for name in STAGES}
            | {"bytes": bytes_of["overall"], "allowed_bytes": allowed(tokens, size)}
        )


def flat(out: Path, meshes: Sequence[str]) -> int:
    """Count and write the table of `--flat`; 1 when a rank in lean memory holds too much.

    Args:
        out: file.
        meshes: "RxC" of those to count, all where there is none.
    """
    found = []
    for tokens, r, c in FLAT:
        for row in flat_rows(tokens, r, c) if f"{r}x{c}" in meshes or not meshes else ():
            print(" ".join(f"{k}={v}" for k, v in row.items()), flush=True)
            found.append(row)
    write_csv(out, found)
    lean = [row for row in found if row["memory"] == "lean"]
    return int(any(row["bytes"] > row["allowed_bytes"] for row in lean))


def main(argv: Sequence[str] | None = None) -> int:
    """Count and write the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.mesh_memory")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--flat", action="store_true", help="every stage over P")
    parser.add_argument("--mesh", nargs="*", default=[], help="of --flat, all by default")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    if options.flat:
        return flat(options.out or OUT.with_name("flat.csv"), options.mesh)
    rows = []
    for tokens in options.tokens:
        for r, c in MESHES:
            counted = rank_bytes(tokens, r, c)
            rows.append(
                {"tokens": tokens, "mesh": f"{r}x{c}", "activation_bytes_modelled": counted}
                | {"weight_bytes": WEIGHTS, "bytes_modelled": counted + WEIGHTS}
            )
            print(f"{tokens} tokens, {r}x{c}: {counted + WEIGHTS:,} bytes a rank", flush=True)
    write_csv(options.out or OUT, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
