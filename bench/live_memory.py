"""Live bytes of each stage of a prediction, in units of N^2, with no GPU.

`foldcp.boltz.families.dry_run` runs the real code on fake CUDA tensors; this prints and writes what
it counts.

    python -m bench.live_memory                  # bench/results/memory/live.csv
    python -m bench.live_memory --mesh 1x1 --explain
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from bench.machine import ROOT, write_csv
from foldcp.boltz.families.dry_run.measure import measure

TOKENS = 2048
BYTES_PER_PAIR, SHARE_OF_2X2 = 2000, 0.26
OUT = ROOT / "bench" / "results" / "memory" / "live.csv"


def main(argv: list[str] | None = None) -> int:
    """Measure 1x1 and every rank of 2x2, write the table; 1 when a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.live_memory")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--mesh", nargs="+", default=["1x1", "2x2"])
    parser.add_argument("--kernels", nargs="+", default=["torch", "triton"])
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--explain", action="store_true", help="what is alive at each peak")
    parser.add_argument("--every-chunk", action="store_true", help="see `few_chunks`; minutes")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(argv)
    rows = []
    ranks = [
        (kernels, mesh, rank)
        for kernels in options.kernels
        for mesh in options.mesh
        for rank in range(_size(mesh))
    ]
    for kernels, mesh, rank in ranks:
        r, c = (int(x) for x in mesh.split("x"))
        found = measure(
            options.tokens, r, c, rank, options.samples, options.sequences, options.explain,
            not options.every_chunk, kernels=kernels,
        )  # fmt: skip
        for peak in found:
            rows.append(
                {"kernels": kernels, "tokens": options.tokens, "samples": options.samples}
                | {"sequences": options.sequences, "mesh": mesh, "rank": rank}
                | {"stage": peak.stage, "bytes": peak.bytes}
                | {"bytes_per_pair": round(peak.per_pair, 1)}
            )
            print(f"{kernels} {mesh} rank {rank} {peak.stage:15} {peak.per_pair:8.1f} B x N^2")
            for size, note in peak.at_peak:
                print(f"    {size / options.tokens**2:8.1f}  {note}")
    write_csv(options.out, rows)
    return max(_judge([r for r in rows if r["kernels"] == k]) for k in options.kernels)


def _size(mesh: str) -> int:
    rows, cols = mesh.split("x")
    return int(rows) * int(cols)


def _judge(rows: list[dict[str, Any]]) -> int:
    one = {r["stage"]: r["bytes_per_pair"] for r in rows if r["mesh"] == "1x1"}
    many = [r["bytes_per_pair"] for r in rows if r["mesh"] == "2x2" and r["stage"] == "overall"]
    missed = [k for k, v in one.items() if v > BYTES_PER_PAIR]
    above = ", ".join(missed) or "none"
    print(f"{rows[0]['kernels']}: stages of 1x1 above {BYTES_PER_PAIR} bytes x N^2: {above}")
    if one and many:
        share = max(many) / one["overall"]
        print(f"2x2: largest rank {share:.3f} of 1x1 (target {SHARE_OF_2X2})")
        return int(bool(missed) or share > SHARE_OF_2X2)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
