"""The exchange engine on one GPU: is what it brings right? No timing of it means anything here.

    python -m bench.gpu.engine             # 4 ranks share GPU 0 through the copy engine, 2x2
    python -m bench.gpu.engine --cpu       # the same checks through shared memory

Every strategy of both triangle ops, forward and backward, raw and FP8, against one rank; a captured
CUDA graph replayed against the eager result; NCCL with one rank, which sends to itself (two ranks
on one GPU with NCCL 2.30 or later: --nccl-pair). Writes --out/engine.csv after each mesh. Where the
compiled extension does not load it is built first, for this GPU alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from bench.machine import ROOT, results_folder, write_csv
from bench.rings import weights
from foldcp.fabric.connect import Options
from foldcp.fabric.mesh import Mesh
from foldcp.fabric.policy import STRATEGIES
from foldcp.fabric.ranks import Ranks
from foldcp.layout.tiles import PairLayout
from foldcp.rings.triangle_attention import triangle_attention
from foldcp.rings.triangle_multiplication import triangle_multiplication
from foldcp_kernels.core.dispatch import set_impl
from foldcp_kernels.core.extension import load

TOLERANCE = {"raw": 2e-5, "fp8": 0.15}  # relative, float32; FP8 rounds panels to 3 bits
N, CHANNELS = 200, 128
BUILD_LIMIT = 40.0  # seconds; 16 cores take about 10


def _update(op: str, z: Tensor, w: Any, first: bool, layout: PairLayout, mesh: Mesh) -> Tensor:
    if op == "triangle_multiplication":
        keep = z.new_zeros(z.shape[:3])
        rows, cols = (layout.valid(s) for s in layout.tile_box())
        keep[:, :rows, :cols] = 1
        return triangle_multiplication(z, keep, w, first, layout, mesh)
    return triangle_attention(z, None, w, first, layout, mesh)


def _tile(x: Tensor, layout: PairLayout) -> Tensor:
    pad = layout.padded - layout.n
    x = torch.nn.functional.pad(x, (0, 0, 0, pad, 0, pad))
    (r0, r1), (c0, c1) = layout.tile_box()
    return x[:, r0:r1, c0:c1].contiguous()


def _error(got: Tensor, want: Tensor, layout: PairLayout) -> float:
    rows, cols = (layout.valid(s) for s in layout.tile_box())
    scale = want.abs().max().clamp(min=1e-30)
    return ((got - want)[:, :rows, :cols].abs().max() / scale).item()


def strategies(mesh: Mesh, n: int) -> list[dict[str, Any]]:
    """Errors of every strategy against a single rank on the same device."""
    alone = Mesh(1, 1, Ranks(0, 1, mesh.device), multiple=1)  # no padding: the definition
    whole, layout = alone.layout(n), mesh.layout(n)
    g = torch.Generator().manual_seed(1)
    z, dout = (torch.randn(1, n, n, CHANNELS, generator=g).to(mesh.device) for _ in range(2))
    rows = []
    for op, names in STRATEGIES.items():
        w, field = weights(op, CHANNELS, mesh.device), op.removeprefix("triangle_")
        for first in (True, False):
            leaf = z.clone().requires_grad_()
            want = _update(op, leaf, w, first, whole, alone)
            (grad,) = torch.autograd.grad(want, leaf, dout)
            for name in names[1:]:
                for wire in ("raw", "fp8"):
                    chosen = mesh.with_policy(wire=wire, **{field: name})
                    with torch.no_grad():
                        got = _update(op, _tile(z, layout), w, first, layout, chosen)
                    mine = _tile(z, layout).requires_grad_()
                    out = _update(op, mine, w, first, layout, chosen)
                    (back,) = torch.autograd.grad(out, mine, _tile(dout, layout))
                    errors = {
                        "forward": _error(got, _tile(want.detach(), layout), layout),
                        "backward": _error(back, _tile(grad, layout), layout),
                    }
                    rows += [
                        {"check": f"{op} {name} {wire} {way} first={first}", "error": e,
                         "ok": e <= TOLERANCE[wire]}
                        for way, e in errors.items()
                    ]  # fmt: skip
    return rows


def captured(mesh: Mesh, n: int) -> list[dict[str, Any]]:
    """A triangle multiplication in a CUDA graph, replayed on new data."""
    if mesh.device.type != "cuda":
        return []
    layout = mesh.layout(n)
    w = weights("triangle_multiplication", CHANNELS, mesh.device)
    rows = []
    for name in STRATEGIES["triangle_multiplication"][1:]:
        chosen = mesh.with_policy(multiplication=name)
        z = torch.randn(1, layout.tile_rows, layout.tile_cols, CHANNELS, device=mesh.device)
        static = z.clone()

        def go(x: Tensor, chosen: Mesh = chosen) -> Tensor:
            with torch.no_grad():
                return _update("triangle_multiplication", x, w, True, layout, chosen)

        go(static)
        graph = torch.cuda.CUDAGraph()
        mesh.ranks.barrier()
        with torch.cuda.graph(graph):
            go(static)
        worst = 0.0
        for k in range(3):
            static.copy_(z + k)
            graph.replay()
            worst = max(worst, _error(static, go(z + k), layout))
        rows.append({"check": f"graph {name}", "error": worst, "ok": worst <= 1e-5})
    return rows


def nccl_alone(device: torch.device) -> list[dict[str, Any]]:
    """The real library, one rank that sends to itself."""
    ops = load().ops
    version = ops.nccl_version("")
    me = ops.nccl_unique_id("")
    engine = ops.nccl_open("", device.index or 0, 0, 1, me, 8, 60.0)
    flight = ops.flight_open(engine)
    x, worst = torch.randn(64, 1000, device=device), 0.0
    for step in range(4):
        y = torch.zeros(1000, 64, device=device)
        staging = torch.empty(1 << 20, dtype=torch.uint8, device=device)
        source = (x * (step + 1)).t()
        args = [source], [0], [0], [y], [0], [0], staging, step
        ops.flight_post(engine, flight, step % 2, *args)
        ops.flight_arrive(engine, flight, step % 2)
        worst = max(worst, (y - source).abs().max().item())
    ops.flight_land(engine, flight)
    ops.engine_close(engine)
    return [{"check": f"nccl {version} to itself", "error": worst, "ok": worst == 0.0}]


def _rank(
    rank: int, port: int, folder: str, transport: str, rows: int, cols: int, cpu: bool, n: int
) -> None:
    torch.set_num_threads(1)
    set_impl("torch")  # exchanges are what is checked: no kernel needs to be compiled
    size = rows * cols
    store = dist.TCPStore("127.0.0.1", port, size, rank == 0, timeout=timedelta(seconds=120))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    device = torch.device("cpu") if cpu else torch.device("cuda", 0)
    found: list[dict[str, Any]] = []
    mesh = None
    for check in (strategies, captured):
        try:
            options = Options(deadline=60.0)
            mesh = mesh or Mesh.create(rows, cols, device, transport=transport, options=options)
            found += check(mesh, n)
        except Exception as error:
            traceback.print_exc()
            found.append({"check": check.__name__, "error": str(error)[:200], "ok": False})
            break
    torch.save(found, Path(folder) / f"{rank}.pt")
    sys.stdout.flush()
    os._exit(0)


def ranks(transport: str, rows: int, cols: int, cpu: bool, n: int) -> list[dict[str, Any]]:
    """What every rank of a mesh found."""
    port = dist.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False).port
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (port, folder, transport, rows, cols, cpu, n), nprocs=rows * cols)
        return [
            {"transport": transport, "mesh": f"{rows}x{cols}", "rank": r, **row}
            for r in range(rows * cols)
            for row in torch.load(Path(folder) / f"{r}.pt", weights_only=False)
        ]


def missing(cpu: bool) -> str:
    """Why there is no extension to check, "" when there is one."""
    found = load()
    return "" if found.ops is not None and (cpu or found.cuda) else found.why or "no CUDA part"


def build() -> None:
    """Build the extension for the GPU at hand."""
    major, minor = torch.cuda.get_device_capability()
    chip = f"{major}.{minor}" + ("a" if major >= 9 else "")
    print(f"building the extension for {chip}: {missing(False)}", flush=True)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    env = os.environ | {"TORCH_CUDA_ARCH_LIST": chip}
    try:
        subprocess.run(command, cwd=ROOT, env=env, timeout=BUILD_LIMIT)
    except subprocess.TimeoutExpired:
        print(f"not built within {BUILD_LIMIT:.0f} s", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the checks; 1 when one fails."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.engine")
    parser.add_argument("--cpu", action="store_true", help="shared memory in place of the GPU")
    parser.add_argument("--nccl-pair", action="store_true", help="NCCL with two ranks on GPU 0")
    parser.add_argument("--built", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--n", type=int, default=N, help="tokens")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args(argv)
    cpu = options.cpu or not torch.cuda.is_available()
    if missing(cpu) and not cpu and not options.built:
        build()
        again = [sys.executable, "-m", "bench.gpu.engine", *(argv or sys.argv[1:]), "--built"]
        os.execv(sys.executable, again)  # what is imported cannot be imported anew
    if why := missing(cpu):
        print(f"left out: no compiled extension ({why})")
        return 0
    out = (options.out or results_folder()) / "engine.csv"
    found: list[dict[str, Any]] = []
    parts: list[Callable[[], list[dict[str, Any]]]] = [
        lambda: ranks("host" if cpu else "copy-engine", 2, 2, cpu, options.n)
    ]
    if not cpu:
        parts.append(lambda: nccl_alone(torch.device("cuda", 0)))
    if options.nccl_pair:
        os.environ |= {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0"}
        parts.append(lambda: ranks("nccl", 1, 2, False, options.n))
    for part in parts:
        try:
            found += part()
        except Exception as error:
            traceback.print_exc()
            found.append({"check": "set-up", "error": str(error)[:200], "ok": False})
        columns = ("transport", "mesh", "rank", "check", "error", "ok")
        table = [{c: row.get(c, "") for c in columns} for row in found]
        write_csv(out, table)
    bad = [row for row in table if not row["ok"]]
    for row in bad:
        print("WRONG", row)
    print(f"{len(table) - len(bad)} of {len(table)} checks of the exchange engine pass; {out}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
