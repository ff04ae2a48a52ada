"""Time the planning of one rank's exchanges and the choice of strategies, with nothing cached.

    python -m bench.planning            # bench/results/cpu/planning.csv

Every rank plans for itself, and needs to know of all others what they want: the time should grow
linearly with the ranks. Times are CPU seconds of one process; the least of a few runs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.machine import ROOT, write_csv
from foldcp.layout.cuts import PIECES
from foldcp.layout.tiles import PairLayout
from foldcp.layout.triangle_plans import triangle_attention_plan, triangle_multiplication_plan
from foldcp.planner.choice import cheapest
from foldcp.planner.cost import ATTENTION, MULTIPLICATION
from foldcp.planner.job import Sizes

SIDES = (2, 4, 8, 16)
TOKENS, CHANNELS = 1024, 128  # of a tile's side, of a and b
ROUTES = ("direct", "ring")
OUT = ROOT / "bench" / "results" / "cpu"


def forget() -> None:
    """Empty every cache of foldcp.layout and foldcp.planner."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("foldcp.layout", "foldcp.planner")):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def cold(call: Callable[[], Any], times: int) -> float:
    """Return the least CPU seconds of a call that finds no cached plan.

    Args:
        call: what is timed.
        times: calls, each after `forget`.
    """
    found = []
    for _ in range(times):
        forget()
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return min(found)


def cases(side: int) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """List what is timed on a square mesh: (task, op, call).

    Args:
        side: of the mesh.
    """
    layout = PairLayout(TOKENS * side, side, side, side + 1)
    for route in ROUTES:
        yield (
            f"plan {route}", MULTIPLICATION,
            lambda r=route: triangle_multiplication_plan(layout, CHANNELS, True, PIECES, r),
        )  # fmt: skip
        yield (
            f"plan {route}", ATTENTION,
            lambda r=route: triangle_attention_plan(layout, True, (0, layout.tile_rows), r),
        )  # fmt: skip
    for op in (MULTIPLICATION, ATTENTION):
        yield (
            "choose", op,
            lambda o=op: cheapest(o, layout.padded, (side, side), "direct", Sizes()),
        )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.planning")
    parser.add_argument("--sides", default=",".join(map(str, SIDES)), help="of square meshes")
    parser.add_argument("--times", type=int, default=3, help="calls of which the least is taken")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the table")
    options = parser.parse_args(argv)
    rows = []
    for side in map(int, options.sides.split(",")):
        for task, op, call in cases(side):
            ms = 1e3 * cold(call, options.times)
            rows.append({"mesh": f"{side}x{side}", "task": task, "op": op, "cpu_ms": f"{ms:.4g}"})
            print(*rows[-1].values(), flush=True)
    write_csv(options.out / "planning.csv", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
