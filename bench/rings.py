"""Timeline of the rings: when each rank's math and transfers ran, and how much of these is hidden.

    foldcp bench rings                               # 2x2 CPU ranks, both triangle ops
    foldcp bench rings --mesh 1x2 --tokens 512 --strategy panel-ring
    foldcp bench rings --model                       # predicted for 4 to 256 GPUs, no run
    torchrun --nproc-per-node 4 -m bench.rings       # one rank per GPU

Writes to --out (foldcp_bench/rings) timeline.csv and per op a trace (.json, for Perfetto or
chrome://tracing) and a plot (.png); with --wire fp8 also wire.csv, what FP8 saves and costs. On
CPU, ranks share the machine's cores and memory, so that the hidden fraction shows that transfers
run beside math, and nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bench.machine import own_folder, write_csv
from foldcp.fabric.exchange import timeline
from foldcp.fabric.exchange.timeline import Interval, hidden
from foldcp.fabric.mesh import Mesh, local_gpu
from foldcp.fabric.policy import STRATEGIES
from foldcp.layout.mesh_shape import choose
from foldcp.rings.triangle_attention import triangle_attention
from foldcp.rings.triangle_multiplication import triangle_multiplication
from foldcp_kernels.triangle_attention import TriangleAttentionWeights
from foldcp_kernels.triangle_multiplication import TriangleMultiplicationWeights

HEADS = 4


def weights(op: str, c: int, device: torch.device) -> Any:
    """Random weights of a triangle op with C = `c` channels, alike on all ranks."""
    g = torch.Generator().manual_seed(0)

    def make(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=g) / shape[-1] ** 0.5).to(device)

    if op == "triangle_multiplication":
        shapes = ((c,), (c,), (2 * c, c), (2 * c, c), (c,), (c,), (c, c), (c, c))
        return TriangleMultiplicationWeights(*(make(*s) for s in shapes))
    shapes = ((c,), (c,), (HEADS, c), (c, c), (c, c), (c, c), (c, c), (c, c))
    return TriangleAttentionWeights(*(make(*s) for s in shapes), HEADS)


@torch.no_grad()
def one_rank(mesh: Mesh, options: argparse.Namespace) -> dict[str, Any]:
    """Record one rank.

    Returns:
        Per op its intervals of the last of some runs, and the seconds that this run took.
    """
    layout = mesh.layout(options.tokens)
    c = options.channels
    out: dict[str, Any] = {}
    for op in STRATEGIES:
        if options.op not in ("both", op):
            continue
        w = weights(op, c, mesh.device)
        z = torch.randn(1, layout.tile_rows, layout.tile_cols, c, device=mesh.device)
        mask = z.new_ones(z.shape[:3])

        def go(at: Mesh, z: torch.Tensor, op: str = op, w: Any = w, m: Any = mask) -> torch.Tensor:
            with torch.autocast(mesh.device.type, torch.bfloat16, mesh.device.type == "cuda"):
                if op == "triangle_multiplication":
                    return triangle_multiplication(z, m, w, True, layout, at)
                return triangle_attention(z, None, w, True, layout, at)

        for _ in range(options.warm):
            go(mesh, z)
        mesh.ranks.barrier()
        with timeline.record(mesh) as line:
            start = time.perf_counter()
            go(mesh, z)
            _settle(mesh)
            seconds = time.perf_counter() - start
        out[op] = {"intervals": line.intervals, "seconds": seconds}
        if mesh.policy.wire == "fp8":
            out[op]["wire"] = _against_raw(mesh, go, torch.randn_like(z))
    return out


def _against_raw(mesh: Mesh, go: Any, z: torch.Tensor) -> dict[str, float]:
    """What FP8 on the wire saves and costs: bytes received, and the update against that of raw."""
    updates, received = {}, {}
    for wire in ("raw", "fp8"):
        chosen = mesh.with_policy(wire=wire)
        updates[wire] = go(chosen, z.clone()) - z
        received[wire] = sum(chosen.traffic.received.values())
    off, size = updates["fp8"] - updates["raw"], updates["raw"]
    return {**received, "off": off.square().sum().item(), "size": size.square().sum().item()}


def _settle(mesh: Mesh) -> None:
    if mesh.device.type == "cuda":
        torch.cuda.synchronize(mesh.device)


def _mesh(options: argparse.Namespace) -> Mesh:
    rows, cols = choose(dist.get_world_size(), options.mesh)
    name = "cuda" if torch.cuda.is_available() and not options.cpu else "cpu"
    fields = {op: op.removeprefix("triangle_") for op in STRATEGIES}
    forced = {f: options.strategy for op, f in fields.items() if options.strategy in STRATEGIES[op]}
    return Mesh.create(rows, cols, name, transport=options.transport, wire=options.wire, **forced)


def _spawned(rank: int, size: int, port: int, folder: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, size, rank == 0, timeout=timedelta(seconds=120))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    mesh = _mesh(options)
    torch.save((mesh.transport, one_rank(mesh, options)), Path(folder) / f"{rank}.pt")
    mesh.close()
    sys.stdout.flush()
    os._exit(0)  # torch may abort at exit while a mesh refers to the group


def spawn(options: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    """Run CPU ranks on this machine: (transport, what each rank recorded)."""
    rows, cols = (int(x) for x in options.mesh.split("x"))
    size = rows * cols
    port = dist.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False).port
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_spawned, (size, port, folder, options), nprocs=size)
        done = [torch.load(Path(folder) / f"{r}.pt", weights_only=False) for r in range(size)]
    return done[0][0], [ranks for _, ranks in done]


def chrome_trace(ranks: Sequence[Sequence[Interval]]) -> dict[str, Any]:
    """The intervals as Chrome's trace events: a process per rank, a row per stream."""
    rows = {"math": 0, "transfer": 1}
    start = min((i.start for r in ranks for i in r), default=0)
    events: list[dict[str, Any]] = []
    for rank, intervals in enumerate(ranks):
        events.append(
            {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}}
        )
        for name, tid in rows.items():
            events.append(
                {"ph": "M", "name": "thread_name", "pid": rank, "tid": tid, "args": {"name": name}}
            )
        for i in intervals:
            events.append(
                {"ph": "X", "name": f"{i.label} {i.step}", "cat": i.kind, "pid": rank,
                 "tid": rows[i.kind], "ts": (i.start - start) / 1e3, "dur": (i.end - i.start) / 1e3}
            )  # fmt: skip
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def plot(ranks: Sequence[Sequence[Interval]], path: Path, title: str) -> None:
    """Bars of math and transfers over time, one band per rank."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.9 * len(ranks) + 1.2), layout="constrained")
    start = min((i.start for r in ranks for i in r), default=0)
    for rank, intervals in enumerate(ranks):
        for kind, shift, shades in (("math", 0.2, ("#0072b2", "#56b4e9")),
                                    ("transfer", -0.2, ("#d55e00", "#e69f00"))):  # fmt: skip
            bars = [i for i in intervals if i.kind == kind]
            spans = [((i.start - start) / 1e6, (i.end - i.start) / 1e6) for i in bars]
            colours = [shades[i.step % 2] for i in bars]
            axes.broken_barh(spans, (rank + shift - 0.18, 0.36), facecolors=colours)
    axes.set_yticks(range(len(ranks)), [f"rank {r}" for r in range(len(ranks))])
    axes.invert_yaxis()
    axes.set_xlabel("ms (blue: math, orange: transfers; shades alternate from step to step)")
    axes.set_title(title, fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _saved(op: str, ranks: list[dict[str, float]], options: argparse.Namespace) -> dict[str, Any]:
    total = {key: sum(r[key] for r in ranks) for key in ranks[0]}
    off = (total["off"] / total["size"]) ** 0.5
    print(
        f"{op}: FP8 moves {total['fp8'] / 1e6:.1f} MB in place of {total['raw'] / 1e6:.1f} "
        f"({total['fp8'] / total['raw']:.2f}x); the update is {100 * off:.1f} % off (rms)"
    )
    return {
        "op": op, "mesh": options.mesh, "tokens": options.tokens, "strategy": options.strategy,
        "raw_bytes": int(total["raw"]), "fp8_bytes": int(total["fp8"]), "off_rms": round(off, 5),
    }  # fmt: skip


def report(transport: str, ranks: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the hidden fractions and write the table, the traces and the plots."""
    folder = options.out
    folder.mkdir(parents=True, exist_ok=True)
    table, saved = [], []
    for op in ranks[0]:
        intervals = [r[op]["intervals"] for r in ranks]
        fractions = [hidden(i) for i in intervals]
        shape = f"{options.mesh}, N = {options.tokens}, {transport}, {options.strategy}"
        slowest = 1e3 * max(r[op]["seconds"] for r in ranks)
        seen = f"transfers are not recorded by {transport}"
        if any(i.kind == "transfer" for found in intervals for i in found):
            low, high = (f"{100 * pick(fractions):.0f}" for pick in (min, max))
            seen = f"{low} to {high} % of the time of a rank's transfers is hidden under math"
        print(f"{op} ({shape}): {slowest:.1f} ms; {seen}")
        if "wire" in ranks[0][op]:
            saved.append(_saved(op, [r[op]["wire"] for r in ranks], options))
        (folder / f"{op}.json").write_text(json.dumps(chrome_trace(intervals)))
        plot(intervals, folder / f"{op}.png", f"{op}: {shape}")
        table += [
            {"op": op, "mesh": options.mesh, "tokens": options.tokens, "transport": transport,
             "strategy": options.strategy, "rank": rank, **asdict(i)}
            for rank, found in enumerate(intervals) for i in found
        ]  # fmt: skip
    write_csv(folder / "timeline.csv", table)
    if saved:
        write_csv(folder / "wire.csv", saved)
    print(f"written to {folder}: timeline.csv, and per op a trace (.json) and a plot (.png)")


def main(argv: list[str] | None = None) -> int:
    """Run, or print the model."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--model" in arguments:
        from bench import rings_model

        arguments.remove("--model")
        return rings_model.main(arguments)
    names = sorted({n for s in STRATEGIES.values() for n in s})
    parser = argparse.ArgumentParser(prog="foldcp bench rings", description=__doc__.split("\n")[0])
    parser.add_argument("--mesh", default=None, help="RxQ; default 2x2, or all ranks of torchrun")
    parser.add_argument("--tokens", type=int, default=None, help="default 384 (CPU), 4096 (GPU)")
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--op", choices=("both", *STRATEGIES), default="both")
    parser.add_argument("--strategy", choices=names, default="auto")
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--wire", choices=("raw", "fp8"), default="raw")
    parser.add_argument("--warm", type=int, default=1, help="runs before the recorded one")
    parser.add_argument("--cpu", action="store_true", help="do not use GPUs")
    parser.add_argument("--out", type=Path, default=own_folder() / "rings")
    options = parser.parse_args(arguments)
    if "RANK" not in os.environ:
        options.mesh = options.mesh or "2x2"
        options.tokens, options.cpu = options.tokens or 384, True
        report(*spawn(options), options)
        return 0
    options.mesh = options.mesh or "auto"
    options.tokens = options.tokens or (4096 if torch.cuda.is_available() else 384)
    if torch.cuda.is_available() and not options.cpu:
        torch.cuda.set_device(local_gpu(int(os.environ.get("LOCAL_RANK", "0"))))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    mesh = _mesh(options)
    options.mesh = f"{mesh.rows}x{mesh.cols}"
    everyone = mesh.ranks.all_gather_object(one_rank(mesh, options))
    if mesh.is_root:
        report(mesh.transport, everyone, options)
    mesh.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
