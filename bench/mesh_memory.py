"""Memory of a GPU over tokens and meshes: a table of `bench.live_memory`, with the weights.

**Modelled, not measured on a GPU**: live bytes are counted as `bench.live_memory` does, fused
kernels, bfloat16, one sample, no alignment. Weights are those of Boltz-2 in float32, which each
rank holds. Of a mesh, the rank in its middle counts, which has neighbours on all sides.

    python -m bench.mesh_memory                  # bench/results/memory/meshes.csv
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.machine import ROOT, write_csv

OUT = ROOT / "bench" / "results" / "memory" / "meshes.csv"
TOKENS = (2048, 8192)
MESHES = ((1, 1), (2, 2), (4, 4), (8, 8))
WEIGHTS = 506_724_992 * 4  # bytes


def rank_bytes(tokens: int, rows: int, cols: int) -> int:
    """Count the activations of the middle rank at its peak.

    Args:
        tokens: N.
        rows: rows of the mesh.
        cols: columns of the mesh.

    Returns:
        Bytes, weights apart.
    """
    from bench.live_memory import measure  # Boltz, which readers of the table do not need

    middle = rows // 2 * cols + cols // 2
    found = measure(tokens, rows, cols, middle, recycles=0, kernels="triton")
    return next(stage.bytes for stage in found if stage.stage == "overall")


def main(argv: Sequence[str] | None = None) -> int:
    """Count and write the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.mesh_memory")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(argv)
    rows = []
    for tokens in options.tokens:
        for r, c in MESHES:
            counted = rank_bytes(tokens, r, c)
            rows.append(
                {"tokens": tokens, "mesh": f"{r}x{c}", "activation_bytes_modelled": counted}
                | {"weight_bytes": WEIGHTS, "bytes_modelled": counted + WEIGHTS}
            )
            print(f"{tokens} tokens, {r}x{c}: {counted + WEIGHTS:,} bytes a rank", flush=True)
    write_csv(options.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
