"""Whole Boltz-2 predictions with untrained weights of the real dimensions.

Stock in plain torch, stock with cuEquivariance's kernels, and foldcp on a 1x1 mesh: time and peak
memory of one `predict_step` (features ready on the device, nothing written). One protein chain of
N tokens with 8 atoms each, without MSA and templates; the same weights, features and seed.

    python -m bench.predict                                    # the real depth on a GPU
    python -m bench.predict --n 512,1024 --steps 20 --recycles 0
    python -m bench.predict --n 64 --blocks 2                   # a CPU

Each side runs in a process of its own (`--one-process`: all in one, which builds the model once).
One that runs out of memory says "oom" and goes on; one that dies is started again for what is left.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from importlib import util
from pathlib import Path
from typing import Any

import torch

from bench.machine import ROOT, results_folder, write_csv
from bench.timing import MIB

SIDES = ("stock", "stock-kernels", "foldcp")
SIZES = {"cuda": "256,512,1024,2048,3605", "cpu": "48"}
# (pairformer blocks, MSA blocks, confidence blocks, recycles, sampling steps): as `boltz predict`
# has them, and what a CPU does in a minute.
DEPTH = {"cuda": (64, 4, 8, 3, 200), "cpu": (2, 1, 1, 0, 2)}
# A foldcp run counts when its coordinates are stock's, by their mean distance from the origin.
# bf16 rounding through 64 blocks moves an untrained model's sample; float32 hardly does.
TOLERANCE = {"cuda": 0.05, "cpu": 1e-3}
FAILED, WARM_UP_N = "failed", 64
# Boltz's default looks for contact constraints in every sampling step; this chain has none, and
# the features here lack what that search reads. Off on both sides.
STEERING = {"contact_guidance_update": False}
KERNEL_PACKAGE = "cuequivariance_ops_torch"


def worker(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Predict for every (N, side) of `options.pairs`, and yield its columns of the table."""
    sys.path.insert(0, str(ROOT / "tests"))
    import parity

    from bench.live_memory import features
    from foldcp.boltz.dense import dense_view
    from foldcp.boltz.swap import apply
    from foldcp.mesh import Mesh

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    depth = (options.blocks, options.msa_blocks, options.confidence_blocks)
    stock = parity.build_model("real", *depth, steering=STEERING).to(device)
    # The chain has no template, and stock would spend time on embedding that.
    stock.use_templates = False
    ours = None
    if any(side == "foldcp" for _, side in options.pairs):
        shared = len({side for _, side in options.pairs}) > 1
        ours = copy.deepcopy(stock) if shared else stock
        apply(ours, Mesh.create(1, 1, device), "bf16" if cuda else "fp32")
    settings = dict(recycling=options.recycles, steps=options.steps, samples=options.samples)

    def predict(n: int, side: str, steps: int) -> dict[str, Any]:
        torch.manual_seed(0)
        feats = {name: x.to(device) for name, x in features(n).items()}
        if side != "foldcp":
            view = dense_view(feats)
            feats = {name: view[name] for name in view}
            stock.use_kernels = side == "stock-kernels"
        model = ours if side == "foldcp" else stock
        return _predict(parity, model, feats, settings | {"steps": steps}, cuda)

    warm: set[str] = set()
    for n, side in options.pairs:
        if options.warm_up and side not in warm:  # compiled kernels stay out of the times
            predict(WARM_UP_N, side, 2)
            warm.add(side)
        yield {"n": n, "side": side} | predict(n, side, options.steps)


def _predict(parity: Any, model: Any, feats: dict, settings: dict, cuda: bool) -> dict[str, Any]:
    before = 0
    precision = torch.autocast("cuda", dtype=torch.bfloat16) if cuda else nullcontext()
    try:
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        with precision:
            out = parity.stock_outputs(model, feats, **settings)
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    except torch.OutOfMemoryError:
        out, seconds = {"exception": True}, 0.0
    except Exception as error:  # one size must not end the others
        return {
            "status": FAILED,
            "reason": (str(error).strip() or repr(error)).splitlines()[0][:300],
        }
    if "coords" not in out or out.get(
        "exception"
    ):  # what Boltz's predict_step turns out-of-memory errors into
        if cuda:
            torch.cuda.empty_cache()
        return {"status": "oom", "reason": "out of device memory"}
    found: dict[str, Any] = {"status": "ok", "seconds": seconds}
    if cuda:
        found["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / MIB
        found["peak_total_mib"] = torch.cuda.max_memory_allocated() / MIB
    coords = out["coords"].float()
    return found | {"checksum": float((coords - coords.mean(-2, keepdim=True)).norm(dim=-1).mean())}


def run(pairs: list[tuple[int, str]], arguments: list[str], limit_s: float) -> list[dict[str, Any]]:
    """Run (N, side) pairs in a process, and in another where that one dies; a row for each.

    Args:
        pairs: what to run, in order. arguments: of the command line.
        limit_s: seconds for all of them, 0 for no limit.
    """
    rows: list[dict[str, Any]] = []
    if util.find_spec(KERNEL_PACKAGE) is None:
        missing = f"no package {KERNEL_PACKAGE}"
        rows += [_no_row(n, x, "unavailable", missing) for n, x in pairs if x == "stock-kernels"]
        pairs = [(n, x) for n, x in pairs if x != "stock-kernels"]
    start, left = time.monotonic(), pairs
    while left:
        command = [sys.executable, "-m", "bench.predict", *arguments]
        command += ["--pairs", ",".join(f"{n}:{side}" for n, side in left)]
        remaining = limit_s - (time.monotonic() - start) if limit_s else None
        if remaining is not None and remaining <= 0:
            return rows + [_no_row(*pair, "skipped", "no time left") for pair in left]
        done, reason = _communicate(command, remaining)
        found = [json.loads(line[4:]) for line in done.splitlines() if line.startswith("row ")]
        rows += found
        left = left[len(found) :]
        if left and reason == "timeout":
            return rows + [_no_row(*pair, "skipped", f"over {limit_s:.0f} s") for pair in left]
        if left:
            rows.append(_no_row(*left[0], FAILED, reason))
            left = left[1:]
    return rows


def _communicate(command: list[str], limit_s: float | None) -> tuple[str, str]:
    """(stdout, why it ended early)."""
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    env.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True) as child:
        try:
            out, err = child.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            child.kill()
            return child.communicate()[0], "timeout"
    lines = err.strip().splitlines()
    return out, lines[-1][:300] if lines and child.returncode else f"exit {child.returncode}"


def _no_row(n: int, side: str, status: str, reason: str) -> dict[str, Any]:
    return {"n": n, "side": side, "status": status, "reason": reason}


def judged(rows: list[dict[str, Any]], tolerance: float) -> list[dict[str, Any]]:
    """Columns in one order; a prediction that is not stock's loses its time."""
    stock = {r["n"]: r["checksum"] for r in rows if r["side"] == "stock" and "checksum" in r}
    times = {r["n"]: r["seconds"] for r in rows if r["side"] == "stock" and "seconds" in r}
    table = []
    for row in sorted(rows, key=lambda r: (r["n"], SIDES.index(r["side"]))):
        n, status, reason = row["n"], row["status"], row.get("reason", "")
        off = ""
        if status == "ok" and n in stock:
            off = abs(row["checksum"] - stock[n]) / max(stock[n], 1e-9)
            if not off <= tolerance:
                status, reason = "wrong", f"coordinates are {off:.1%} off stock's in their mean"
        ok = status == "ok"
        faster = times[n] / row["seconds"] if ok and n in times else ""
        table.append(
            {"n": n, "side": row["side"], "status": status}
            | {"seconds": round(row["seconds"], 3) if ok else ""}
            | {"speedup_over_stock": round(faster, 3) if faster else ""}
            | {
                k: round(row[k], 1) if ok and k in row else ""
                for k in ("peak_mib", "peak_total_mib")
            }
            | {"off_stock": f"{off:.2e}" if off != "" else "", "reason": reason}
        )
    return table


def main(argv: list[str] | None = None) -> int:
    """Run the sides and write the table; 1 when foldcp is wrong or fails."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    blocks, msa, confidence, recycles, steps = DEPTH[kind]
    parser = argparse.ArgumentParser(prog="python -m bench.predict")
    parser.add_argument("--n", default=SIZES[kind])
    parser.add_argument("--sides", default=",".join(SIDES), help=", ".join(SIDES))
    parser.add_argument("--blocks", type=int, default=blocks)
    parser.add_argument("--msa-blocks", type=int, default=msa)
    parser.add_argument("--confidence-blocks", type=int, default=confidence)
    parser.add_argument("--recycles", type=int, default=recycles)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--warm-up", action=argparse.BooleanOptionalAction, default=kind == "cuda")
    parser.add_argument("--within", type=float, default=0, help="seconds for all sides together")
    parser.add_argument("--out", type=Path, default=results_folder() / "predict.csv")
    parser.add_argument("--one-process", action="store_true", help="one model for all sides")
    parser.add_argument("--pairs", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    try:
        import boltz.main  # noqa: F401
    except ImportError as error:
        print(f"bench.predict needs Boltz, which is not importable here: {error}")
        return 0
    if options.pairs:
        options.pairs = [(int(n), x) for n, x in (p.split(":") for p in options.pairs.split(","))]
        for row in worker(options):
            print("row " + json.dumps(row), flush=True)
        return 0
    depth = ("blocks", "msa_blocks", "confidence_blocks", "recycles", "steps", "samples")
    chosen = {name: getattr(options, name) for name in depth}
    arguments = [f"--{k.replace('_', '-')}={v}" for k, v in chosen.items()]
    arguments.append("--warm-up" if options.warm_up else "--no-warm-up")
    # foldcp first: with little time, its figures and stock's are what is wanted.
    sides = sorted(options.sides.split(","), key=("foldcp", "stock", "stock-kernels").index)
    pairs = [(int(n), side) for n in options.n.split(",") for side in sides]
    groups = [pairs] if options.one_process else [[p for p in pairs if p[1] == x] for x in sides]
    rows: list[dict[str, Any]] = []
    start = time.monotonic()
    for i, group in enumerate(groups):
        share = 0.0
        if options.within:
            share = (options.within - (time.monotonic() - start)) / (len(groups) - i)
        rows += run(group, arguments, share)
        table = [row | chosen for row in judged(rows, TOLERANCE[kind])]
        write_csv(options.out, table)
    for row in table:
        said = (
            f"{row['seconds']} s, {row['speedup_over_stock']}x stock, {row['peak_mib'] or '-'} MiB"
        )
        if row["status"] != "ok":
            said = f"{row['status']}: {row['reason']}"
        print(f"N={row['n']} {row['side']:14} {said}")
    print(f"{len(table)} rows in {options.out}")
    return int(any(r["side"] == "foldcp" and r["status"] in ("wrong", FAILED) for r in table))


if __name__ == "__main__":
    sys.exit(main())
