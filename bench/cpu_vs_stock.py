"""Time and memory of one prediction on a 1x1 mesh against stock Boltz-2, on a CPU in float32.

Real dimensions with 4 pairformer blocks, 1 MSA block and 1 confidence block; one chain without an
MSA, no recycle, 2 sampling steps, 1 sample. Each run is a process of its own, stock and foldcp in
turn; the median of the runs is what counts. Peak memory is what one prediction adds to the
resident set of the process with the model loaded (high-water mark of the kernel, reset before).

    python -m bench.cpu_vs_stock                 # bench/results/cpu/{vs_stock,stages}.csv
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bench.machine import ROOT, write_csv

SIDES = ("stock", "foldcp")
BLOCKS, MSA_BLOCKS, CONFIDENCE_BLOCKS = 4, 1, 1
RECYCLES, STEPS, SAMPLES = 0, 2, 1
TIME_TARGET, MEMORY_TARGET = 1.0, 0.5
OUT = ROOT / "bench" / "results" / "cpu"
MIB = 1 << 20

# (stage, attribute of the model, method in stock, method in foldcp)
STAGES = (
    ("input_embedder", "input_embedder", "forward", "forward"),
    ("templates", "template_module", "forward", "forward"),
    ("msa", "msa_module", "forward", "forward"),
    ("pairformer", "pairformer_module", "forward", "forward"),
    ("distogram", "distogram_module", "forward", "contact_probability"),
    ("conditioning", "diffusion_conditioning", "forward", "forward"),
    ("sampling", "structure_module", "sample", "sample"),
    ("confidence", "confidence_module", "forward", "forward"),
)
# Submodules whose time is added up over all blocks of the trunk and the confidence module.
PARTS = (
    "tri_mul_out", "tri_mul_in", "tri_att_start", "tri_att_end", "transition_z", "attention",
    "transition_s", "pair_weighted_averaging", "msa_transition", "outer_product_mean",
    "score_model", "confidence_heads",
)  # fmt: skip


def high_water() -> int:
    """Largest resident set since the last `reset_high_water`, in bytes."""
    return _status("VmHWM")


def reset_high_water() -> None:
    """Let the high-water mark start again from the present resident set."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {key}: this bench needs Linux")


class Stages:
    """Wall time, processor time and peak resident set of named stages."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = defaultdict(float)
        self.cpu: dict[str, float] = defaultdict(float)
        self.peak: dict[str, int] = defaultdict(int)
        self.top = 0

    def time(self, owner: Any, method: str, name: str) -> None:
        """Count the time spent in a method of an object under a name."""
        self._wrap(owner, method, name, self._timed)

    def measure(self, owner: Any, method: str, name: str) -> None:
        """Count time and peak memory; measured stages must not nest."""
        self._wrap(owner, method, name, self._measured)

    def _wrap(self, owner: Any, method: str, name: str, how: Callable[..., Any]) -> None:
        inner = getattr(owner, method)

        def outer(*args: Any, **kwargs: Any) -> Any:
            with how(name):
                return inner(*args, **kwargs)

        setattr(owner, method, outer)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall[name] += time.perf_counter() - wall
        self.cpu[name] += time.process_time() - cpu

    @contextmanager
    def _measured(self, name: str) -> Iterator[None]:
        self.top = max(self.top, high_water())
        reset_high_water()
        with self._timed(name):
            yield
        self.peak[name] = max(self.peak[name], high_water())
        self.top = max(self.top, self.peak[name])


def worker(
    side: str, folder: str, yaml_path: str, threads: int, coords: Path | None = None
) -> dict[str, Any]:
    """Run one prediction and return its cost.

    Args:
        side: "stock" or "foldcp".
        folder: session folder of `parity.prepare`.
        yaml_path: the input.
        threads: of torch.
        coords: file for the coordinates [atoms, 3].

    Returns:
        `seconds`, `cpu_seconds`, `peak_mib` beyond the loaded model, `stages` (name -> [wall s,
        CPU s, peak MiB]) and a checksum of the coordinates.
    """
    sys.path.insert(0, str(ROOT / "tests/support"))
    import parity
    import torch

    torch.set_num_threads(threads)
    model = parity.build_model("real", BLOCKS, MSA_BLOCKS, CONFIDENCE_BLOCKS)
    prepared = parity.prepare(folder, yaml_path)
    if side == "stock":
        feats = parity.stock_features(prepared)
    else:
        from foldcp.boltz.families.swap import apply
        from foldcp.fabric.mesh import Mesh

        apply(model, Mesh.create(1, 1))
        feats = parity.compact_features(prepared)
    stages = Stages()
    for name, attribute, in_stock, in_foldcp in STAGES:
        method = in_stock if side == "stock" else in_foldcp
        stages.measure(getattr(model, attribute), method, name)
    for path, module in list(model.named_modules()):
        part = path.rsplit(".", 1)[-1]
        if part in PARTS:
            stages.time(module, "forward", part)
    gc.collect()
    reset_high_water()
    base, wall, cpu = _status("VmRSS"), time.perf_counter(), time.process_time()
    out = parity.stock_outputs(model, feats, recycling=RECYCLES, steps=STEPS, samples=SAMPLES)
    cost = {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mib": (max(stages.top, high_water()) - base) / MIB,
        "stages": {
            k: [stages.wall[k], stages.cpu[k], max(0, stages.peak[k] - base) / MIB]
            for k in stages.wall
        },
        "tokens": feats["token_index"].shape[1],
        "checksum": float(out["coords"].abs().mean()),
    }
    if coords is not None:
        there = feats["atom_pad_mask"][0].bool()
        np.save(coords, out["coords"].float().reshape(-1, len(there), 3)[0][there].numpy())
    return cost


def run(
    side: str, folder: str, yaml_path: Path, threads: int, coords: Path | None = None
) -> dict[str, Any]:
    """Run `worker` in a new process."""
    command = [sys.executable, "-m", "bench.cpu_vs_stock", "--worker", side]
    command += ["--folder", folder, "--yaml", str(yaml_path), "--threads", str(threads)]
    command += ["--coords", str(coords)] if coords is not None else []
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "FOLDCP": "0"}  # stock is stock
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the {side} run failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def write_input(path: Path, tokens: int) -> Path:
    """Write a YAML file with one chain of `tokens` residues and no MSA."""
    letters = "ACDEFGHIKLMNPQRSTVWY"
    chain = "".join(letters[(7 * i + i * i // 11) % 20] for i in range(tokens))
    path.write_text(
        "version: 1\nsequences:\n"
        f"  - protein:\n      id: A\n      msa: empty\n      sequence: {chain}\n"
    )
    return path


def compare(sizes: dict[int, int], threads: int) -> tuple[list[dict], list[dict]]:
    """Run both sides in turn.

    Args:
        sizes: number of runs of each side by number of tokens.
        threads: of torch.

    Returns:
        Rows of the two tables, totals and stages.
    """
    totals, stages = [], []
    with tempfile.TemporaryDirectory() as folder:
        for tokens, runs in sizes.items():
            path = write_input(Path(folder) / f"chain{tokens}.yaml", tokens)
            found: dict[str, list[dict]] = {side: [] for side in SIDES}
            for i in range(runs):
                for side in SIDES if i % 2 == 0 else SIDES[::-1]:
                    found[side].append(run(side, folder, path, threads))
                    last = found[side][-1]
                    print(
                        f"N={tokens} {side}: {last['seconds']:.1f} s, CPU "
                        f"{last['cpu_seconds']:.1f} s, {last['peak_mib']:.0f} MiB",
                        flush=True,
                    )
            totals.append(_total(tokens, runs, found))
            stages += _stages(tokens, found)
    return totals, stages


def _total(tokens: int, runs: int, found: dict[str, list[dict]]) -> dict[str, Any]:
    row: dict[str, Any] = {"tokens": tokens, "runs": runs}
    for key in ("seconds", "cpu_seconds", "peak_mib"):
        stock, ours = (statistics.median(x[key] for x in found[side]) for side in SIDES)
        row |= {f"stock_{key}": round(stock, 2), f"foldcp_{key}": round(ours, 2)}
        row[f"{key}_ratio"] = round(ours / stock, 3)
    stock, ours = (found[side][0]["checksum"] for side in SIDES)
    # A wrong prediction would have no meaningful cost.
    if abs(stock - ours) > 1e-3 * abs(stock):
        raise RuntimeError(f"N={tokens}: mean |coordinate| is {ours}, stock has {stock}")
    return row


def _stages(tokens: int, found: dict[str, list[dict]]) -> list[dict[str, Any]]:
    names = dict.fromkeys(n for side in SIDES for x in found[side] for n in x["stages"])
    rows = []
    for name in names:
        row: dict[str, Any] = {"tokens": tokens, "stage": name}
        for i, key in enumerate(("seconds", "cpu_seconds", "peak_mib")):
            for side in SIDES:
                values = [x["stages"].get(name, [0, 0, 0])[i] for x in found[side]]
                row[f"{side}_{key}"] = round(statistics.median(values), 3)
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Compare and write the tables; 1 when a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.cpu_vs_stock")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--runs", type=int, default=0, help="0: 3 up to 256 tokens, else 1")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--worker", choices=SIDES)
    parser.add_argument("--folder")
    parser.add_argument("--yaml")
    parser.add_argument("--coords", type=Path)
    options = parser.parse_args(argv)
    if options.worker:
        chosen = options.folder, options.yaml, options.threads, options.coords
        result = worker(options.worker, *chosen)
        print(json.dumps(result))
        return 0
    sizes = {n: options.runs or (3 if n <= 256 else 1) for n in options.tokens}
    totals, stages = compare(sizes, options.threads)
    write_csv(options.out / "vs_stock.csv", totals)
    write_csv(options.out / "stages.csv", stages)
    missed = 0
    for row in totals:
        ok = row["seconds_ratio"] <= TIME_TARGET and row["peak_mib_ratio"] <= MEMORY_TARGET
        missed += not ok
        print(
            f"N={row['tokens']}: time {row['seconds_ratio']:.2f}x stock (target {TIME_TARGET}), "
            f"memory {row['peak_mib_ratio']:.2f}x (target {MEMORY_TARGET}): "
            f"{'met' if ok else 'MISSED'}"
        )
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
