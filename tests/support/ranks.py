"""Call a function on every rank of a mesh, in processes that live as long as the test session.

One set of processes per number of ranks: a rank imports a module once, for all tests that use it.
Each call forms a process group and a mesh of its own, in the state of a new process: environment,
folder, random numbers and settings of torch and foldcp. A set in which a rank failed is ended, so
that the next test gets another one. New processes are forks of a server that has imported torch,
and Boltz where the session has: they start in a tenth of a second.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing as mp
import os
import pickle
import random
import secrets
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from strict import strict

from foldcp.fabric import machine
from foldcp.fabric.mesh import Mesh
from foldcp_kernels.core.chunking import set_chunk_bytes
from foldcp_kernels.core.dispatch import set_impl

LIMIT = 600.0  # seconds that a call may take
GRACE = 130.0  # seconds for the other ranks to end after one failed; gloo gives up after 120
MOST = 18  # ranks that wait for a call; beyond, those that waited longest are ended
_SEED = 0
# What the server imports; the second is what torch's deterministic mode takes 2 s to import.
_ALWAYS = ("torch.distributed", "torch._inductor.config", "foldcp.fabric.mesh")
_IF_USED = ("triton", "boltz.main", "foldcp.boltz.families.swap")
_pools: dict[int, _Pool] = {}


def run(
    rows: int,
    cols: int,
    fn: Callable[..., Any],
    *args: Any,
    fresh: bool = False,
    bare: bool = False,
    **options: Any,
) -> list:
    """Call `fn(mesh, *args)` on every rank; `fn` must be importable (top level of a module).

    Args:
        rows: rows of the mesh.
        cols: columns of the mesh.
        args: sent to each rank, as copies.
        fresh: in new processes, which end with the call: for functions that patch what `_reset`
            does not restore, break a transport on purpose, or leave threads behind.
        bare: fresh, and without what the server of processes has imported: for functions that must
            do without a package.
        options: of `Mesh.create`, such as route or transport.

    Returns:
        The results in rank order.

    Raises:
        AssertionError: a rank failed; carries that rank's traceback.
    """
    size = rows * cols
    if size == 1:
        return [fn(Mesh.create(1, 1, "cpu", **options), *args)]
    fresh = fresh or bare
    pool = None if fresh else _pools.pop(size, None)
    if pool is not None and (ended := pool.ended()):
        warnings.warn(f"after {pool.last}: {ended}; started anew", stacklevel=2)
        pool.close()
        pool = None
    pool = pool or _Pool(size, bare)
    try:
        results = pool.call(rows, cols, fn, args, options)
    except BaseException:
        pool.close()
        raise
    if fresh:
        pool.close()
        return results
    _pools[size] = pool  # the last of the dictionary: what waited longest comes first
    while sum(_pools) > MOST and len(_pools) > 1:
        _pools.pop(next(iter(_pools))).close()
    return results


@atexit.register
def close_all() -> None:
    """End all processes."""
    while _pools:
        _pools.popitem()[1].close()


class _Pool:
    """Processes that wait for calls.

    Args:
        size: number of ranks.
        bare: nothing is imported in them before they start.
    """

    def __init__(self, size: int, bare: bool) -> None:
        context: Any = mp.get_context("spawn" if bare else "forkserver")
        if not bare:
            context.set_forkserver_preload([*_ALWAYS, *(m for m in _IF_USED if m in sys.modules)])
        self.size, self.last, self._calls = size, "the start", 0
        self._ends, self._processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, there), daemon=True)
            process.start()
            there.close()  # so that the end of the process is seen here
            self._ends.append(here)
            self._processes.append(process)
        assert self._ends[0].poll(LIMIT), "the ranks did not start"
        port = self._ends[0].recv()
        for end in self._ends[1:]:
            end.send(port)

    def ended(self) -> str:
        """Say which rank has ended while it waited for a call, "" for none."""
        codes = [process.exitcode for process in self._processes]
        found = [f"rank {r} ended with code {c}" for r, c in enumerate(codes) if c is not None]
        return ", ".join(found)

    def call(self, rows: int, cols: int, fn: Callable[..., Any], args: Any, options: Any) -> list:
        """Call a function on all ranks, see `run`."""
        self._calls += 1
        self.last = f"{fn.__module__}.{fn.__name__} on {rows}x{cols}"
        state = (self._calls, sys.path, dict(os.environ), os.getcwd())
        work = pickle.dumps((rows, cols, fn, args, options))
        for end in self._ends:
            end.send((state, work))
        answers: dict[int, tuple[bool, Any]] = {}
        until = time.monotonic() + LIMIT
        while len(answers) < self.size:
            waiting = {self._ends[r]: r for r in range(self.size) if r not in answers}
            ready = wait(list(waiting), max(0.0, until - time.monotonic()))
            if not ready:
                break
            for end in ready:
                rank = waiting[end]
                answers[rank] = self._answer(rank)
                if not answers[rank][0]:
                    until = min(until, time.monotonic() + GRACE)
        late = (False, "no result within the time that a call may take")
        failed = [(r, answers.get(r, late)[1]) for r in range(self.size)
                  if not answers.get(r, late)[0]]  # fmt: skip
        # Peers of a failed rank fail too, with a closed connection: show the cause.
        failed.sort(key=lambda x: "gloo" in x[1] or x[1] in ("", late[1]))
        assert not failed, f"rank {failed[0][0]} of {rows}x{cols} failed:\n{failed[0][1]}"
        return [answers[r][1] for r in range(self.size)]

    def _answer(self, rank: int) -> tuple[bool, Any]:
        try:
            return pickle.loads(self._ends[rank].recv_bytes())
        except (EOFError, ConnectionResetError):
            self._processes[rank].join(5)
            return False, f"no result left: it ended with code {self._processes[rank].exitcode}"

    def close(self) -> None:
        """End the processes, whatever they do."""
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


def _serve(rank: int, size: int, end: Connection) -> None:
    within = timedelta(seconds=120)
    gc.freeze()  # what the server imported: collecting is for what a call leaves
    machine._UNKNOWN = secrets.token_hex(16)  # which forks of one process share
    try:
        if rank == 0:
            store = dist.TCPStore("127.0.0.1", 0, None, True, within, wait_for_workers=False)
            end.send(store.port)
        else:
            store = dist.TCPStore("127.0.0.1", end.recv(), None, False, within)
        while True:
            state, work = end.recv()
            call, *rest = state
            ok, answer = _work(dist.PrefixStore(str(call), store), rank, size, work, *rest)
            end.send_bytes(pickle.dumps((ok, answer)))
            if not ok:  # which closes its connections: nobody waits for it
                os._exit(1)
    except EOFError:  # the session is over
        os._exit(0)


def _work(
    store: dist.Store,
    rank: int,
    size: int,
    work: bytes,
    path: list[str],
    environ: dict[str, str],
    folder: str,
) -> tuple[bool, Any]:
    """Do one call; returns whether it succeeded, and its result or traceback."""
    within = timedelta(seconds=120)
    try:
        _reset(path, environ, folder)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=within)
        rows, cols, fn, args, options = pickle.loads(work)
        mesh = Mesh.create(rows, cols, "cpu", **options)
        result = fn(mesh, *args)
        dist.barrier()
        if mesh.link is not None:
            mesh.link.close()
        del mesh, args
        dist.destroy_process_group()
        gc.collect()
        return True, result
    except BaseException:  # pytest's failures are no Exceptions
        return False, traceback.format_exc()


def _reset(path: list[str], environ: dict[str, str], folder: str) -> None:
    """Bring back the state of a new process that the session would start now."""
    sys.path[:] = path
    os.environ.clear()
    os.environ.update({**environ, "OMP_NUM_THREADS": "1"})
    os.chdir(folder)
    strict()
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(_SEED)
    np.random.seed(_SEED)
    random.seed(_SEED)
    set_chunk_bytes(None)
    set_impl("auto")
