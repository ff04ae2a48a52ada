"""Peak memory of the pair tensors of each rank: 1x1 against 2x2 on four processes over gloo.

Boltz-2 in its real dimensions with few blocks (as in `bench.live_memory`) predicts 384 tokens on a
CPU. Counted are the storages of at least T_r x T_c elements that operators make, from allocation
to the end of their last view; parameters and features are not.

    python -m bench.tile_memory                  # bench/results/memory/tiles.csv
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.fake_device import LiveBytes
from bench.live_memory import birth, features, shallow_model
from bench.machine import ROOT, write_csv
from bench.synthetic.checkpoint import build_model
from foldcp.boltz.swap import apply
from foldcp.layout import PairLayout
from foldcp.mesh import Mesh
from foldcp.modules.model import Settings

TOKENS, STEPS = 384, 2
SHARE_OF_2X2 = 0.27
OUT = ROOT / "bench" / "results" / "memory" / "tiles.csv"


class LargeTensors(TorchDispatchMode):
    """Counts the live bytes of what operators return, from a number of elements on.

    Args:
        least: elements of the smallest tensor that counts.
    """

    def __init__(self, least: int) -> None:
        super().__init__()
        self.live, self.least = LiveBytes(), least

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if storage.nbytes() >= self.least * x.element_size():
                    self.live.see(x)
        return out


def rank_peak(mesh: Mesh, n: int, explain: bool) -> tuple[int, int, list[tuple[int, str]]]:
    """Predict on one rank of a mesh (every rank calls this).

    Args:
        mesh: the mesh. n: tokens. explain: note what is alive at the peak.

    Returns:
        (peak bytes of pair-sized storages, bytes received, the largest storages at the peak).
    """
    model = build_model(shallow_model()).requires_grad_(False)
    apply(model, mesh)
    feats = features(n)
    layout = PairLayout(n, mesh.rows, mesh.cols, mesh.rank)
    settings = Settings(recycling_steps=0, sampling_steps=STEPS, diffusion_samples=1)
    torch.manual_seed(0)
    with LargeTensors(layout.tile_rows * layout.tile_cols) as large:
        for x in (*model.parameters(), *model.buffers(), *feats.values()):
            large.live.see(x)
        start = large.live.now
        large.live.restart()
        large.live.note = birth if explain else None
        model.foldcp(feats, settings)
    return large.live.peak - start, sum(mesh.received.values()), large.live.at_peak


def main(argv: list[str] | None = None) -> int:
    """Measure both meshes and write the table; 1 when the target is missed."""
    sys.path.insert(0, str(ROOT / "tests"))
    from ranks import run

    parser = argparse.ArgumentParser(prog="python -m bench.tile_memory")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--explain", action="store_true", help="what is alive at each peak")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(argv)
    n, rows = options.tokens, []
    for r, c in ((1, 1), (2, 2)):
        for rank, found in enumerate(run(r, c, rank_peak, n, options.explain)):
            peak, received, at_peak = found
            row = {"tokens": n, "mesh": f"{r}x{c}", "rank": rank, "peak_bytes": peak}
            row |= {"bytes_per_pair": round(peak / n**2, 1)}
            row |= {"share_of_1x1": round(peak / (rows[0]["peak_bytes"] if rows else peak), 4)}
            rows.append(row | {"received_bytes": received})
            print(", ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
            for size, note in at_peak:
                print(f"    {size / n**2:8.1f}  {note}")
    write_csv(options.out, rows)
    largest = max(row["share_of_1x1"] for row in rows[1:])
    print(f"2x2: largest rank {largest:.3f} of 1x1 (target {SHARE_OF_2X2})")
    return int(largest > SHARE_OF_2X2)


if __name__ == "__main__":
    sys.exit(main())
