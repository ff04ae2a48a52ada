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
from lost import SIZE, SLACK, Case, Ended, ring, run_cases

from foldcp.errors import TransportError
from foldcp.fabric.connect import Options
from foldcp.fabric.exchange.autograd import stream
from foldcp.fabric.mesh import Mesh


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
    made = ring(size, rank, numel)
    for _ in stream(mesh, made, (x,), ((0, 1),), "ring"):
        pass
    mesh.ranks.barrier()
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


DEADLINE = 3  # FOLDCP_TIMEOUT of the cases below
STOP0 = {"0": "stop"}
# Whoever serves the store is stopped for good; and those whom the others meet late.
STOPPED = {
    "joining": Case(STOP0, "joining"),
    "sampling": Case(STOP0),
    "sampling, host": Case(STOP0, transport="host"),
    "writing, host": Case(STOP0, "writing", "host"),
    "closing": Case(STOP0, "closing"),
    "launcher, sampling": Case({"launcher": "stop"}, agent=True),
    "other, closing": Case({"2": "stop"}, "closing"),
    "paused": Case({"0": "pause 6"}),
}
DOUBLE = {"0": "kill", "2": "kill"}
KILLED = {
    "sampling": Case(DOUBLE),
    "sampling, host": Case(DOUBLE, transport="host", delay=0.3),
    "one after the other": Case(DOUBLE, later=0.05, delay=0.1),
    "launcher": Case({"launcher": "kill", "2": "kill"}, agent=True),
}
BRIEF = Case({"0": "pause 1.5"}, "closing")


@pytest.fixture(scope="module")
def ends() -> dict[str, Ended]:
    stopped = {f"stopped {name}": case for name, case in STOPPED.items()}
    killed = {f"killed {name}": case for name, case in KILLED.items()}
    return run_cases({**stopped, **killed, "brief": BRIEF})


@pytest.mark.parametrize("name", STOPPED)
def test_all_end_in_time_whoever_is_stopped(ends: dict[str, Ended], name: str) -> None:
    case, end = STOPPED[name], ends[f"stopped {name}"]
    others = [rank for rank in range(SIZE) if str(rank) not in case.deeds]
    # When ranks part all is done, and the first to give up wakes the one that the others wait for.
    spared = {0} if "closing" in name else set()
    assert {end.codes[rank] for rank in others} - spared == {1} and not any(end.noise), end
    assert end.seconds < DEADLINE + SLACK, end
    said = [line for rank in others for line in end.said[rank]]
    if name == "joining":  # of whom nothing is known
        assert len(said) == len(others) and not end.woken
        # What a rank says that can reach no store at all, see test_bad_input.py.
        assert all("could not meet rank 0 at 127.0.0.1:" in line for line in said)
        assert all("check that all ranks were started" in line for line in said)
        return
    who = "launcher (process" if "launcher" in case.deeds else f"rank {next(iter(case.deeds))} (in"
    # What rank 0 was doing stands in the store, which does not answer where it serves it.
    served = "for the store that rank 0 serves: rank 0 is" if who == "rank 0 (in" else who
    stopped = [line for line in said if "is stopped (SIGSTOP)" in line]
    assert any(who in line or served in line for line in stopped), end
    assert end.woken, "what was stopped never ends"


@pytest.mark.parametrize("name", KILLED)
def test_two_killed_at_once_are_missed_aloud(ends: dict[str, Ended], name: str) -> None:
    case, end = KILLED[name], ends[f"killed {name}"]
    others = [rank for rank in range(SIZE) if str(rank) not in case.deeds]
    code = None if "launcher" in case.deeds else 1  # it would tell
    assert end.seconds < 8 and {end.codes[rank] for rank in others} == {code}, end
    assert not any(end.noise), end
    for rank in others:
        (line,) = end.said[rank]
        assert "is gone" in line or "which served the store" in line, end


def test_a_pause_at_the_end_costs_nothing(ends: dict[str, Ended]) -> None:
    assert ends["brief"].codes == [0] * SIZE and not any(ends["brief"].said), ends["brief"]
