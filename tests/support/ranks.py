"""Run a function on the ranks of a mesh: spawned once per mesh, every case inside."""

from __future__ import annotations

import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from strict import strict

from foldcp.fabric.mesh import Mesh


def run(rows: int, cols: int, fn: Callable[..., Any], *args: Any, **options: Any) -> list:
    """Call `fn(mesh, *args)` on every rank; `fn` must be importable (top level of a module).

    Args:
        rows: rows of the mesh.
        cols: columns of the mesh.
        options: of `Mesh.create`, such as route or transport.

    Returns:
        The results in rank order.

    Raises:
        AssertionError: a rank failed; carries that rank's traceback.
    """
    size = rows * cols
    if size == 1:
        return [fn(Mesh.create(1, 1, "cpu", **options), *args)]
    with tempfile.TemporaryDirectory() as folder:
        port = _free_port()
        context = mp.get_context("spawn")
        procs = [
            context.Process(target=_main, args=(r, rows, cols, port, folder, options, fn, args))
            for r in range(size)
        ]
        for p in procs:
            p.start()
        for p in procs:
            p.join()
        paths = [Path(folder) / f"{r}.pt" for r in range(size)]
        done = [torch.load(p, weights_only=False) if p.exists() else (False, "") for p in paths]
        failed = [(r, text) for r, (ok, text) in enumerate(done) if not ok]
        # Peers of a failed rank fail too, with a closed connection: show the cause.
        failed.sort(key=lambda x: "gloo" in x[1] or not x[1])
        assert not failed, "rank {} of {}x{} failed:\n{}".format(
            failed[0][0], rows, cols, failed[0][1] or "no result left"
        )
        return [value for _, value in done]


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _main(rank, rows, cols, port, folder, options, fn, args) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    strict()
    dist.init_process_group(
        "gloo",
        rank=rank,
        world_size=rows * cols,
        init_method=f"tcp://127.0.0.1:{port}",
        timeout=timedelta(seconds=120),
    )
    try:
        result = (True, fn(Mesh.create(rows, cols, "cpu", **options), *args))
    except Exception:
        result = (False, traceback.format_exc())
    torch.save(result, Path(folder) / f"{rank}.pt")
    if result[0]:
        dist.barrier()
    dist.destroy_process_group()
    # torch may abort at exit while a mesh still refers to the group.
    os._exit(0)
