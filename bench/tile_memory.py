"""Peak memory of the pair tensors of each rank: 1x1 against 2x2 on four processes over gloo.

Boltz-2 in its real dimensions with few blocks (as in `bench.live_memory`) predicts 384 tokens on a
CPU. Counted are the storages of at least T_r x T_c elements that operators make, from allocation
to the end of their last view; parameters and features are not. `pair_bytes` leaves out what the
atom windows and the token activations hold: they grow with N alone, and at 384 tokens some of them
are as large as a tile; `all_bytes` has them too.

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

from bench.machine import ROOT, write_csv
from bench.synthetic.checkpoint import build_model
from foldcp.boltz.families.dry_run.device import LiveBytes
from foldcp.boltz.families.dry_run.features import features
from foldcp.boltz.families.dry_run.measure import birth
from foldcp.boltz.families.dry_run.model import shallow_model
from foldcp.boltz.families.swap import apply
from foldcp.fabric.mesh import Mesh
from foldcp.modules.settings import Settings

TOKENS, STEPS = 384, 2
SHARE_OF_2X2 = 0.27
_NO_PAIRS = {"atoms", "atom_encoder", "atom_transformer", "token_transformer"}
OUT = ROOT / "bench" / "results" / "memory" / "tiles.csv"


class LargeTensors(TorchDispatchMode):
    """Counts the live bytes of what operators return, from a number of elements on.

    Args:
        least: elements of the smallest tensor that counts.
    """

    def __init__(self, least: int) -> None:
        super().__init__()
        self.all, self.pair, self.least = LiveBytes(), LiveBytes(), least

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if storage.nbytes() >= self.least * x.element_size():
                    fresh = self.all.see(x)
                    if fresh and not _made_by_atoms_or_tokens():
                        self.pair.see(x)
        return out


def _made_by_atoms_or_tokens() -> bool:
    """Whether a caller is one of the modules that never touch pairs of tokens."""
    frame = sys._getframe()
    while frame is not None:
        if Path(frame.f_code.co_filename).stem in _NO_PAIRS:
            return True
        frame = frame.f_back
    return False


def rank_peak(mesh: Mesh, n: int, explain: bool) -> tuple[int, int, int, list]:
    """Predict on one rank of a mesh (every rank calls this).

    Args:
        mesh: the mesh.
        n: tokens.
        explain: note what is alive at the peak.

    Returns:
        (peak bytes of pair tensors, of all large tensors, bytes received, the largest pair
        tensors at the peak as (bytes, note)).
    """
    model = build_model(shallow_model()).requires_grad_(False)
    apply(model, mesh)
    feats = features(n)
    layout = mesh.layout(n)
    settings = Settings(recycling_steps=0, sampling_steps=STEPS, diffusion_samples=1)
    torch.manual_seed(0)
    with LargeTensors(layout.tile_rows * layout.tile_cols) as large:
        for x in (*model.parameters(), *model.buffers(), *feats.values()):
            large.all.see(x)
        start = large.all.now
        large.all.restart()
        large.pair.note = birth if explain else None
        model.predict_step.fold(feats, settings)
    received = sum(mesh.traffic.received.values())
    return large.pair.peak, large.all.peak - start, received, large.pair.at_peak


def main(argv: list[str] | None = None) -> int:
    """Measure both meshes and write the table; 1 when the target is missed."""
    sys.path.insert(0, str(ROOT / "tests/support"))
    from ranks import run

    parser = argparse.ArgumentParser(prog="python -m bench.tile_memory")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--explain", action="store_true", help="what is alive at each peak")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(argv)
    n, rows = options.tokens, []
    for r, c in ((1, 1), (2, 2)):
        for rank, found in enumerate(run(r, c, rank_peak, n, options.explain)):
            peak, total, received, at_peak = found
            one = rows[0] if rows else {"pair_bytes": peak, "all_bytes": total}
            rows.append(
                {"tokens": n, "mesh": f"{r}x{c}", "rank": rank}
                | {"pair_bytes": peak, "pair_share": round(peak / one["pair_bytes"], 4)}
                | {"all_bytes": total, "all_share": round(total / one["all_bytes"], 4)}
                | {"received_bytes": received}
            )
            print(", ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
            for size, note in at_peak:
                print(f"    {size / n**2:8.1f}  {note}")
    write_csv(options.out, rows)
    largest = max(row["pair_share"] for row in rows[1:])
    print(f"2x2: largest rank {largest:.3f} of 1x1 (target {SHARE_OF_2X2})")
    return int(largest > SHARE_OF_2X2)


if __name__ == "__main__":
    sys.exit(main())
