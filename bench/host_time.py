"""What the host does for one pairformer block and one diffusion step, without GPU and links.

Boltz-2's block and score model in their real dimensions run on tensors that are shapes alone, as
rank 0 of a mesh whose peers do not exist. Counted are exchanges, groups (one per posted step and
communicator), messages and their transfers, those that are packed, staged bytes, and launches of
Triton kernels and of torch's operators. Timed is one thread of the host, with

- Triton's own handling of arguments, up to the point where a kernel would be handed to the driver,
- torch's dispatch and most of its shape functions (see `bench.no_gpu`),
- the compiled engine with streams and links that do nothing.

Not in the times: what CUDA, the driver and NCCL need for a launch, an event or a group, torch's
allocator on a GPU, `torch.cuda.device`, and launches that pack.

    python -m bench.host_time                        # bench/results/host/host_time.csv
    python -m bench.host_time --against 53f6967      # and another revision, by its own bench
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import fields, is_dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.machine import ROOT, write_csv
from bench.no_gpu import Counted, Launches, as_on_a_gpu, launched, short_shapes
from foldcp.boltz.families.dry_run.mesh import fake_mesh
from foldcp.fabric.mesh import Mesh
from foldcp.layout.schedule import Plan
from foldcp.layout.tiles import PairLayout
from foldcp_kernels.core.dispatch import using

MESHES, TOKENS = ((1, 1), (2, 2), (2, 4)), (256, 512, 1024, 2048, 3605)
OUT = ROOT / "bench" / "results" / "host" / "host_time.csv"
SINGLE, PAIR, HEADS = 384, 128, 16
_ROUNDS = 5


def mesh_of(rows: int, cols: int, communicators: int) -> Mesh:
    """Rank 0 of a mesh on no device, with the compiled engine and links that do nothing."""
    from foldcp.fabric.transport.engine_transport import EngineTransport
    from foldcp_kernels.core.extension import load

    if rows * cols == 1:
        return fake_mesh(1, 1, 0, "meta", multiple=16)
    engine = load().ops.nothing_open(0, cols)
    link = Counted(EngineTransport("host", None, engine), communicators, cols)  # type: ignore[arg-type]
    return fake_mesh(rows, cols, 0, "meta", link=link, multiple=16)  # type: ignore[arg-type]


def block(n: int, mesh: Mesh) -> Callable[[], Any]:
    """One pairformer block."""
    from boltz.model.layers.pairformer import PairformerLayer as Stock

    from foldcp.modules.trunk import pairformer

    with torch.device("meta"):
        stock = Stock(SINGLE, PAIR, num_heads=HEADS, v2=True).eval().requires_grad_(False)
    layer, layout = pairformer.PairformerLayer(stock, mesh), mesh.layout(n)
    z = torch.empty(1, layout.tile_rows, layout.tile_cols, PAIR, device="meta")
    s = torch.empty(1, layout.shard, SINGLE, device="meta")
    if hasattr(pairformer, "stack_masks"):  # made once for all blocks of a stack
        masks = pairformer.stack_masks(layout, mesh)

        def one() -> Any:
            layer.draw(s, z, layout)
            return layer.compute(s, z, *masks, layout)

        return one
    mask = pairformer.pair_mask(layout, z.device)
    return lambda: layer(s, z, layout, mask)


def _prepared(value: Any, mesh: Any) -> Any:
    """A copy of what a step is prepared with, of shapes alone and for another mesh."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, Mesh):
        return mesh
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_prepared(x, mesh) for x in value)
    if is_dataclass(value) and not isinstance(value, (type, Plan, PairLayout)):
        changed = {f.name: _prepared(getattr(value, f.name), mesh) for f in fields(value)}
        return replace(value, **changed)
    return value


def diffusion_step(n: int, mesh: Mesh) -> Callable[[], Any]:
    """One call of the score model for five samples, prepared on a fake CUDA device."""
    from boltz.model.modules.diffusion_conditioning import DiffusionConditioning as StockMade
    from boltz.model.modules.diffusionv2 import DiffusionModule as Stock

    from foldcp.boltz.families import boltz2_options
    from foldcp.boltz.families.dry_run.device import fake_cuda
    from foldcp.boltz.families.dry_run.features import features
    from foldcp.boltz.families.dry_run.model import onto
    from foldcp.layout.tiles import AtomLayout
    from foldcp.modules.diffusion.conditioning import DiffusionConditioning
    from foldcp.modules.diffusion.score_model import DiffusionModule

    depth = dict(
        atom_encoder_depth=3, atom_encoder_heads=4, token_transformer_depth=24,
        token_transformer_heads=HEADS, atom_decoder_depth=3, atom_decoder_heads=4,
    )  # fmt: skip
    windows = dict(atoms_per_window_queries=32, atoms_per_window_keys=128)
    sizes = dict(token_s=SINGLE, token_z=PAIR, atom_s=128, atom_z=16, atom_feature_dim=388)
    with torch.device("meta"):
        made = StockMade(**sizes, **windows, **depth).eval().requires_grad_(False)
        stock = Stock(SINGLE, 128, **windows, **depth).eval().requires_grad_(False)
    layout = mesh.layout(n)
    rows, cols, shard = layout.tile_rows, layout.tile_cols, layout.shard
    feats = features(n)
    atoms = feats["atom_pad_mask"].shape[1]
    atom_layout = AtomLayout(atoms // 32, layout.size, 0)
    with fake_cuda() as device, using("torch"):
        torch.set_autocast_enabled("cuda", False)
        here = fake_mesh(mesh.rows, mesh.cols, 0, "cuda")
        fake = deepcopy(stock)
        onto(made, device)
        onto(fake, device)
        known = {name: device.known(x) for name, x in feats.items()}
        z = torch.empty(1, rows, cols, PAIR, device="cuda")
        s = torch.empty(1, shard, SINGLE, device="cuda")
        relpos = torch.empty(1, rows, cols, PAIR, device="cuda")
        conditioning = DiffusionConditioning(
            made, here, boltz2_options.diffusion_conditioning(made)
        )
        found = conditioning(s, z, lambda lo, hi: relpos[:, lo:hi], known, layout, atom_layout)
        prepared = DiffusionModule(fake, here).prepare(found, s, s, known, layout, atom_layout)
    prepared = _prepared(prepared, mesh)
    for part in ("encoder", "decoder"):
        name = f"atom_attention_{part}"
        layers = getattr(getattr(stock, name), f"atom_{part}").diffusion_transformer.layers
        changed = replace(getattr(prepared, part), layers=layers)
        prepared = replace(prepared, **{part: changed})
    score = DiffusionModule(stock, mesh)
    noisy = torch.empty(5, atoms, 3, device="meta")
    single = torch.empty(1, shard, 2 * SINGLE, device="meta")

    def step() -> Any:
        torch.set_autocast_enabled("cuda", False)  # as Boltz around its sampler
        return score(prepared, noisy, single)

    return step


PARTS: dict[str, Callable[[int, Mesh], Callable[[], Any]]] = {
    "pairformer_block": block,
    "diffusion_step": diffusion_step,
}


def measure(
    part: str, n: int, rows: int, cols: int, times: int, communicators: int
) -> dict[str, Any]:
    """Counts of one call, and the median time of some.

    Args:
        part: one of `PARTS`.
        n: tokens.
        rows: rows of the mesh.
        cols: columns of the mesh.
        times: calls that are timed.
        communicators: that this revision's engine has.
    """
    counts: Counter[str] = Counter()
    mesh = mesh_of(rows, cols, communicators)
    with as_on_a_gpu():
        call = PARTS[part](n, mesh)
        call()  # plans, programs and weights in the dtype of the kernels
        launched.clear()
        if mesh.link is not None:
            mesh.link.counts, mesh.link.counting = counts, True  # type: ignore[attr-defined]
        with Launches(counts):
            call()
        found = dict(counts + launched)
        if mesh.link is not None:
            mesh.link.counting = False  # type: ignore[attr-defined]
        taken = []
        with short_shapes():
            for _ in range(times):
                start = time.thread_time()
                call()
                taken.append(time.thread_time() - start)
    row: dict[str, Any] = {"part": part, "mesh": f"{rows}x{cols}", "tokens": n}
    for name in (
        "exchanges", "groups", "messages", "transfers", "packed", "packed_pieces", "staged_bytes",
        "triton_launches", "torch_launches",
    ):  # fmt: skip
        row[name] = found.get(name, 0)
    row["host_ms"] = round(1e3 * statistics.median(taken), 3) if taken else ""
    row["host_ms_min"] = round(1e3 * min(taken), 3) if taken else ""
    return row


def communicators_of(root: Path) -> int:
    """How many communicators the engine of a tree has."""
    (engine,) = (root / "csrc").rglob("engine.h")
    return 3 if "kLanes = 3" in engine.read_text() else 1


class Worker:
    """A process that measures with the sources of one tree."""

    def __init__(self, root: Path, commit: str) -> None:
        self.commit = commit
        environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        environment["TRITON_INTERPRET"] = "0"  # tests of kernels set it
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.host_time", "--worker"],
            cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def measure(self, *case: Any) -> dict[str, Any]:
        """`measure` in that process."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(json.dumps(case) + "\n")
        stdin.flush()
        for line in stdout:
            if line.startswith("{"):
                return {"state": self.commit} | json.loads(line)
        raise RuntimeError(f"measuring {self.commit} failed, see above")

    def close(self) -> None:
        """End."""
        self._process.communicate()


def _work() -> int:
    torch.set_num_threads(1)
    for line in sys.stdin:
        part, n, rows, cols, times = json.loads(line)
        print(json.dumps(measure(part, n, rows, cols, times, communicators_of(ROOT))), flush=True)
    return 0


@contextmanager
def other_tree(revision: str) -> Iterator[Path]:
    """Check out another revision, which measures itself with this compiled extension."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "-q", "--detach", str(root), revision], check=True)
        try:
            for library in (ROOT / "foldcp_kernels").glob("_C*.so"):
                shutil.copy(library, root / "foldcp_kernels")
            yield root
        finally:
            subprocess.run([*git, "remove", "--force", str(root)], check=True)


def _summary(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        said = ", ".join(f"{k} {v}" for k, v in row.items() if v not in (0, ""))
        print(said, flush=True)


def _in_turns(workers: list[Worker], case: tuple[Any, ...], times: int) -> list[dict[str, Any]]:
    """Measure a case with each revision in turns, so that all feel what else the machine does."""
    rounds = [[w.measure(*case, max(1, times // _ROUNDS)) for w in workers] for _ in range(_ROUNDS)]
    found = []
    for of_one in zip(*rounds, strict=True):
        row = dict(of_one[0])
        row["host_ms"] = round(statistics.median(r["host_ms"] for r in of_one), 3)
        row["host_ms_min"] = min(r["host_ms_min"] for r in of_one)
        found.append(row)
    return found


def main(argv: list[str] | None = None) -> int:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.host_time")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--against", help="another revision to measure in the same run")
    parser.add_argument("--part", default=",".join(PARTS))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--times", type=int, default=15, help="calls of which the median is taken")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(argv)
    if options.worker:
        return _work()
    rows = []
    with ExitStack() as stack:
        workers = [Worker(ROOT, "this")]
        if options.against:
            root = stack.enter_context(other_tree(options.against))
            workers.append(Worker(root, options.against))
        for worker in workers:
            stack.callback(worker.close)
        for part in options.part.split(","):
            for (r, c), n in product(MESHES, map(int, options.tokens.split(","))):
                found = _in_turns(workers, (part, n, r, c), options.times)
                _summary(found)
                rows += found
    write_csv(options.out, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
