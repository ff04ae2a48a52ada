"""Time and memory of loading Boltz-2's checkpoint on ranks of one machine, beside stock.

    python -m bench.loading                      # writes an untrained checkpoint of real size first
    python -m bench.loading --cache ~/.boltz

Every rank loads at the same time, after Boltz is imported, and looks at all weights once, as a
prediction does. Private memory is what the process holds alone beyond what it held before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.machine import ROOT, write_csv

OUT = ROOT / "bench" / "results" / "cpu" / "loading.csv"
RANKS = (1, 2, 4)
CHECKPOINT = "boltz2_conf.ckpt"


def private_bytes() -> int:
    """Bytes of memory that belong to this process alone."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(x.split()[1]) * 1024 for x in lines if x.startswith("Private_Dirty"))


def load(side: str, path: Path) -> dict[str, Any]:
    """Load on this rank, when a line arrives on standard input.

    Args:
        side: "foldcp" or "stock".
        path: of the checkpoint.

    Returns:
        Seconds until the model is there and until all weights were looked at, private bytes.
    """
    import torch
    from boltz.model.models.boltz2 import Boltz2

    from foldcp.boltz.families import loading, weights

    torch.set_num_threads(1)
    before = private_bytes()
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    options = {"strict": True, "map_location": "cpu", "use_kernels": False}
    if side == "stock":
        model = Boltz2.load_from_checkpoint(path, **options)
    else:
        model = loading.load(Boltz2, path, **options)
    loaded = time.perf_counter() - start
    weights.check(model, path)
    seconds = time.perf_counter() - start
    return {"load_s": loaded, "checked_s": seconds, "private_bytes": private_bytes() - before}


def measure(side: str, ranks: int, path: Path) -> dict[str, Any]:
    """Load on so many ranks at once; the slowest and the largest of them."""
    command = [sys.executable, "-m", "bench.loading", "--rank", side, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(ranks)]
    for process in processes:
        while process.stdout.readline().strip() != "ready":
            assert process.poll() is None, "a rank ended, see above"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    found = [json.loads(p.communicate()[0].strip().splitlines()[-1]) for p in processes]
    most = {name: max(of_rank[name] for of_rank in found) for name in found[0]}
    return {"side": side, "ranks": ranks, **{k: round(v, 2) for k, v in most.items()}}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.loading", description=__doc__)
    parser.add_argument("--cache", type=Path, help="folder of the checkpoint")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.rank:
        print(json.dumps(load(options.rank[0], Path(options.rank[1]))), flush=True)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        cache = options.cache or Path(folder)
        if options.cache is None:
            from bench.synthetic import make_cache

            make_cache(cache, "real")
        path = cache.expanduser() / CHECKPOINT
        rows = [measure("stock", 1, path)]
        rows += [measure("foldcp", ranks, path) for ranks in RANKS]
    for row in rows:
        print(", ".join(f"{k} {v}" for k, v in row.items()))
    write_csv(options.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
