"""Time of a ring of three steps by each transport of this machine: `python -m bench.transports`.

Four ranks, each sends to the next and receives from the one before, three times; the median of some
trials, in each of which the transports take turns. On CPU ranks share the cores: compare, no more.
Writes bench/results/cpu/transports.csv.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bench.machine import results_folder, write_csv
from foldcp.fabric.mesh import Mesh
from foldcp.fabric.transport.base import Transport
from foldcp.fabric.transport.engine_transport import tag
from foldcp.fabric.transport.torch_transport import TorchTransport
from foldcp.fabric.transport.wire import Message

STEPS = 3
SIZES = (4 << 10, 256 << 10, 16 << 20)  # bytes of a message


def ring(mesh: Mesh, link: Transport, size: int, times: int) -> float:
    """Seconds of one ring of three steps.

    Args:
        mesh: of ranks; every one must call it.
        link: a transport between them.
        size: bytes of a message, a multiple of 4.
        times: rings in a row, of which this is the mean.
    """
    ahead, behind = (mesh.rank + 1) % mesh.size, (mesh.rank - 1) % mesh.size
    buffers = [torch.full((size // 4,), float(mesh.rank)), torch.empty(size // 4)]
    steps = [
        ([Message(ahead, (buffers[i],), (False,))], [Message(behind, (buffers[1 - i],), (False,))])
        for i in (0, 1)
    ]
    nothing = torch.empty(0, dtype=torch.uint8)
    flight = link.flight()
    mesh.ranks.barrier()
    start = time.perf_counter()
    for _ in range(times):
        for step in range(STEPS):
            flight.post(step % 2, *steps[step % 2], tag("ring", step), nothing)
            flight.arrive(step % 2)
    seconds = (time.perf_counter() - start) / times
    flight.land()
    return seconds


def compare(mesh: Mesh, trials: int = 5) -> dict[int, dict[str, float]]:
    """Median seconds of this rank, per size and transport: the mesh's own, and gloo."""
    links = (mesh.link, TorchTransport(mesh.ranks))
    out: dict[int, dict[str, float]] = {}
    for size in SIZES:
        times = max(2, min(60, (4 << 20) // size))
        found: dict[str, list[float]] = {link.name: [] for link in links}  # type: ignore[union-attr]
        for _ in range(trials):
            for link in links:
                found[link.name].append(ring(mesh, link, size, times))  # type: ignore
        out[size] = {name: statistics.median(times) for name, times in found.items()}
    return out


def _rank(rank: int, size: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, size, rank == 0, timeout=timedelta(seconds=120))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    mesh = Mesh.create(2, 2, transport="host")
    torch.save(compare(mesh), Path(folder) / f"{rank}.pt")
    mesh.close()
    os._exit(0)  # torch may abort at exit while a mesh refers to the group


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write the table: of each figure that of the slowest rank."""
    parser = argparse.ArgumentParser(prog="python -m bench.transports")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args(argv)
    port = dist.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False).port
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (4, port, folder), nprocs=4)
        ranks = [torch.load(Path(folder) / f"{r}.pt", weights_only=False) for r in range(4)]
    rows: list[dict[str, Any]] = []
    for size in SIZES:
        for name in ranks[0][size]:
            ms = 1e3 * max(r[size][name] for r in ranks)
            rows.append({"bytes": size, "transport": name, "ranks": 4, "ms": round(ms, 4)})
            print(f"{size:>9} bytes, {STEPS} steps, {name:5} {ms:9.3f} ms")
    write_csv((options.out or results_folder()) / "transports.csv", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
