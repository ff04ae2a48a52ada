"""Ranks that are killed, stopped or abort: the others notice in seconds, nothing is left behind."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from foldcp.connect import Options
from foldcp.exchange import stream
from foldcp.mesh import Mesh
from foldcp.schedule import Plan, Schedule, Want, plan
from foldcp.transport import TransportError


def _ring(size: int, rank: int, numel: int) -> Plan:
    """Every rank takes the others' rows of `numel` elements in turn, from the last user."""
    return plan(
        Schedule(
            size,
            size,
            lambda r, _: ((r, r + 1), (0, numel)),
            lambda r, t: (Want(0, (((r + t) % size, (r + t) % size + 1), (0, numel))),),
            "ring",
        ),
        rank,
        1,
    )


def _victim(
    rank: int, rows: int, cols: int, port: int, folder: str, what: str, deadline: float
) -> None:
    torch.set_num_threads(1)
    size = rows * cols
    dist.init_process_group(
        "gloo", rank=rank, world_size=size, init_method=f"tcp://127.0.0.1:{port}",
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    mesh = Mesh.create(rows, cols, transport="host", options=Options(deadline=deadline))
    numel = 1 << 18  # 1 MiB: several slots
    x = torch.full((1, numel), float(rank))
    made = _ring(size, rank, numel)
    for _ in stream(mesh, made, (x,), ((0, 1),), "ring"):
        pass
    mesh.barrier()
    start = time.monotonic()
    if rank == 1:
        Path(folder, "struck").write_text(str(start))
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        mesh.link.abort("rank 1: out of memory")  # type: ignore[union-attr]
    try:
        for _ in range(1000):
            for _ in stream(mesh, made, (x,), ((0, 1),), "ring"):
                pass
        said = "nothing"
    except TransportError as error:
        said = str(error)
    Path(folder, f"said{rank}").write_text(f"{time.monotonic()}\n{said}")
    os._exit(0)


def _strike(tmp: Path, rows: int, cols: int, what: str, deadline: float) -> tuple[list[float], set]:
    """(seconds until each other rank has noticed, what they said)."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("spawn")
    procs = [
        context.Process(target=_victim, args=(r, rows, cols, port, str(tmp), what, deadline))
        for r in range(rows * cols)
    ]
    for p in procs:
        p.start()
    for rank, p in enumerate(procs):
        if rank != 1:
            p.join(90)
            assert not p.is_alive(), f"rank {rank} hangs"
    procs[1].kill()
    procs[1].join()
    struck = float((tmp / "struck").read_text())
    noticed = [(tmp / f"said{r}").read_text().split("\n", 1) for r in range(rows * cols) if r != 1]
    return [float(t) - struck for t, _ in noticed], {said for _, said in noticed}


@pytest.mark.parametrize("rows,cols", [(2, 2), (2, 3)], ids=str)
def test_a_killed_rank_is_noticed(tmp_path: Path, rows: int, cols: int) -> None:
    before = set(os.listdir("/dev/shm"))
    seconds, said = _strike(tmp_path, rows, cols, "kill", 300)
    assert max(seconds) < 5, seconds
    assert said == {"exchange of tiles (host): rank 1 is gone (its process has ended)"}
    assert set(os.listdir("/dev/shm")) == before


def test_an_abort_is_noticed(tmp_path: Path) -> None:
    seconds, said = _strike(tmp_path, 2, 2, "abort", 300)
    assert max(seconds) < 1, seconds
    assert said == {"exchange of tiles (host): rank 1: out of memory"}


def test_a_stopped_rank_is_noticed_at_the_deadline(tmp_path: Path) -> None:
    seconds, said = _strike(tmp_path, 2, 2, "stop", 2)
    assert 1.5 < max(seconds) < 5, seconds
    assert len(said) == 1 and "s for an exchange that made no progress" in said.pop()
