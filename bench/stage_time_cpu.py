"""Real predictions on CPU ranks for `bench.stage_time --validate`: seconds of stages and of ops.

Boltz-2 in its real dimensions with few blocks, and weights that are only noise, runs in processes
of one thread. A rank is timed by the clock and by the seconds of a core that it used: with more
ranks than cores, or on a machine that others use, only the latter can be told from the run itself.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

from bench.machine import ROOT
from foldcp.planner.dims import BOLTZ2
from foldcp.planner.workload import Workload

ATOMS_PER_TOKEN, STEPS, SAMPLES, SEQUENCES = 8, 4, 2, 32
# As `bench.live_memory.shapes_of_model` builds it.
DIMS = replace(BOLTZ2, pairformer_blocks=2, msa_blocks=1, confidence_blocks=1, itemsize=4)
# op -> (module, name): what is timed inside of stages.
OPS = {
    "triangle_multiplication": ("foldcp.modules.trunk.block_weights", "triangle_multiplication"),
    "triangle_attention": ("foldcp.modules.trunk.block_weights", "triangle_attention"),
    "outer_product_mean": ("foldcp.modules.trunk.msa", "outer_product_mean"),
    "token_transformer": ("foldcp.modules.diffusion.score_model", "token_transformer"),
    "atom_transformer": ("foldcp.modules.diffusion.score_model", "atom_transformer"),
}


def workload(tokens: int) -> Workload:
    """The input of a run.

    Args:
        tokens: N.
    """
    return Workload(
        tokens, ATOMS_PER_TOKEN * tokens, SEQUENCES, 0, SAMPLES, None, 0, STEPS, "boltz2"
    )


class Clock:
    """Sums seconds by name, of the clock and of this process's threads."""

    def __init__(self) -> None:
        self.found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def timed(self, name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        """A function that counts its seconds.

        Args:
            name: they are counted under.
            inner: the function.
        """

        def outer(*args: Any, **kwargs: Any) -> Any:
            wall, cpu = time.perf_counter(), time.process_time()
            try:
                return inner(*args, **kwargs)
            finally:
                of = self.found[name]
                of[0] += time.perf_counter() - wall
                of[1] += time.process_time() - cpu

        return outer


@contextmanager
def timed_ops(clock: Clock) -> Iterator[None]:
    """Count the seconds of `OPS`.

    Args:
        clock: that counts.
    """
    from importlib import import_module

    before = []
    for name, (module, attribute) in OPS.items():
        owner = import_module(module)
        before.append((owner, attribute, getattr(owner, attribute)))
        setattr(owner, attribute, clock.timed(name, getattr(owner, attribute)))
    try:
        yield
    finally:
        for owner, attribute, inner in before:
            setattr(owner, attribute, inner)


def run_rank(tokens: int, rows: int, cols: int, repeats: int) -> list[dict[str, list[float]]]:
    """Predict on this rank: seconds (clock, core) of stages and ops, for each repeat.

    Args:
        tokens: N.
        rows: rows of the mesh.
        cols: columns of the mesh.
        repeats: predictions.
    """
    import torch
    import torch.distributed as dist

    from foldcp.boltz.families.dry_run.features import features
    from foldcp.boltz.families.dry_run.measure import STAGES
    from foldcp.boltz.families.dry_run.model import shapes_of_model
    from foldcp.boltz.families.swap import apply
    from foldcp.fabric.mesh import Mesh
    from foldcp.modules.settings import Settings

    torch.set_num_threads(1)
    if rows * cols > 1:
        dist.init_process_group("gloo")
    model = deepcopy(shapes_of_model()).to_empty(device="cpu")
    torch.manual_seed(0)
    for p in (*model.parameters(), *model.buffers()):
        if p.is_floating_point():
            p.data.uniform_(-0.03, 0.03)
    apply(model, Mesh.create(rows, cols, "cpu"))
    fold, found = model.predict_step.fold, []
    clock = Clock()
    for name, owner, method in STAGES:
        if owner(model) is not None:
            setattr(owner(model), method, clock.timed(name, getattr(owner(model), method)))
    settings = Settings(0, STEPS, SAMPLES)
    with timed_ops(clock), torch.no_grad():
        for _ in range(repeats):
            clock.found.clear()
            if rows * cols > 1:
                dist.barrier()
            clock.timed("total", fold)(features(tokens, SEQUENCES), settings)
            found.append(dict(clock.found))
    return found


def run(tokens: int, rows: int, cols: int, repeats: int) -> dict[str, tuple[float, float]]:
    """Predict on a mesh of processes.

    Args:
        tokens: N.
        rows: rows of the mesh.
        cols: columns of the mesh.
        repeats: predictions; the one that took the least by the clock counts.

    Returns:
        By name of stage or op the seconds by the clock, and those by the cores: the most that a
        rank used, or all that the ranks used over the number of cores where that is more.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    size, ranks = rows * cols, []
    for rank in range(size):
        env = os.environ | {
            "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "FOLDCP": "0",
        }  # fmt: skip
        command = [sys.executable, "-m", "bench.stage_time_cpu", *map(str, (tokens, rows, cols))]
        ranks.append(
            subprocess.Popen(
                [*command, str(repeats)], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True
            )
        )
    said = [process.communicate()[0] for process in ranks]
    if any(process.returncode for process in ranks):
        raise RuntimeError(f"a rank of {rows}x{cols} failed at {tokens} tokens, see above")
    of_ranks = [json.loads(text.splitlines()[-1]) for text in said]
    found = [_joined(one) for one in zip(*of_ranks, strict=True)]
    return min(found, key=lambda one: one["total"][0])


def _joined(ranks: Any) -> dict[str, tuple[float, float]]:
    """Seconds by name of one repeat on all ranks."""
    cores, found = os.cpu_count() or 1, {}
    for name in ranks[0]:
        walls, used = zip(*(rank[name] for rank in ranks), strict=True)
        found[name] = (max(walls), max(*used, sum(used) / cores))
    return found


def main(argv: list[str]) -> int:
    """Run one rank and print what it found."""
    tokens, rows, cols, repeats = map(int, argv)
    print(json.dumps(run_rank(tokens, rows, cols, repeats)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
