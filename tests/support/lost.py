"""Ranks of which some are lost on cue: `python lost.py < cases.json`.

Everything is imported once; launcher and ranks are forks that meet, exchange and part without a
model, so that a case takes little more than what it waits for.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from logged import fork

SIZE = 4  # ranks
LIMIT = 45.0  # seconds that a case may take
SLACK = 10.0  # seconds beyond the deadline in which all must have ended
_AT_ONCE = 5  # cases, which mostly wait


@dataclass(frozen=True)
class Case:
    """One run.

    Args:
        deeds: of ranks, and of the "launcher": "kill", "stop", or "pause S" for S seconds.
        phase: in which they are done: "joining", "sampling", "writing" or "closing".
        transport: of the mesh.
        agent: the launcher serves the store, not rank 0.
        timeout: FOLDCP_TIMEOUT.
        delay: seconds from the begin of the phase to the deeds.
        later: seconds between the deeds.
    """

    deeds: dict[str, str]
    phase: str = "sampling"
    transport: str = "gloo"
    agent: bool = False
    timeout: int = 3
    delay: float = 0.0
    later: float = 0.0


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Args:
        codes: of the ranks, negative for a signal, None where the launcher cannot tell.
        said: lines of foldcp, of each rank.
        noise: Python's tracebacks, of each rank.
        seconds: from the deeds to the end of those ranks to which nothing was done.
        woken: what was stopped went on and ended as well.
    """

    codes: list[int | None]
    said: list[list[str]]
    noise: list[int]
    seconds: float
    woken: bool


def run_cases(cases: dict[str, Case]) -> dict[str, Ended]:
    """Run cases in one new process; returns how each ended, by name."""
    ended = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps({name: asdict(case) for name, case in cases.items()}),
        env={**os.environ, "OMP_NUM_THREADS": "1", "FOLDCP": "0"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    return {name: Ended(**end) for name, end in found.items()}


def ring(size: int, rank: int, numel: int) -> Any:
    """Every rank takes the others' rows of `numel` elements in turn, from the last user."""
    from foldcp.layout.schedule import Schedule, Want, plan

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


def _until(happened: Callable[[], Any], seconds: float = LIMIT) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if happened():
            return True
        time.sleep(0.01)
    return False


def _rank(case: Case, rank: int, port: int, folder: Path) -> None:
    from foldcp.boltz.command import guarded
    from foldcp.runtime import session
    from foldcp.runtime.place import Place

    variables = {"RANK": rank, "WORLD_SIZE": SIZE, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": SIZE}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "FOLDCP_TIMEOUT": case.timeout}
    variables |= {"TORCHELASTIC_USE_AGENT_STORE": case.agent}
    os.environ.update({name: str(value) for name, value in variables.items()})

    def reach(phase: str, wait: bool = False) -> None:
        if phase == case.phase:
            (folder / f"at{rank}").touch()
            if wait:
                _until((folder / "struck").exists)

    try:
        first = not case.agent and rank == 0 or str(rank) in case.deeds
        if not first:
            reach("joining", wait=True)
        run = session.start(Place.find(os.environ), float(case.timeout))
        if first:
            reach("joining", wait=True)
        run.gather(None)
        _work(case, run, rank, reach)
        run.close()
    except BaseException as error:
        guarded.end(error)
    session.leave()


def _work(case: Case, run: Any, rank: int, reach: Callable[..., None]) -> None:
    import torch

    from foldcp.config import Config
    from foldcp.fabric.exchange.autograd import stream

    config = Config(transport=case.transport, timeout=case.timeout)
    mesh = run.form(2, SIZE // 2, torch.device("cpu"), config)
    made, x = ring(SIZE, rank, 1 << 16), torch.full((1, 1 << 16), float(rank))
    run.at("diffusion of one")
    for step in range(10**9 if case.phase == "sampling" else 3):
        if step == 3:
            reach("sampling")
        for _ in stream(mesh, made, (x,), ((0, 1),), "ring"):
            time.sleep(0.002)
    run.at("writing of one")
    reach("writing")
    if case.phase == "writing" and rank == 0:
        time.sleep(1000)
    run.wait_for_root()
    stop = run._stop_watching
    run._stop_watching = lambda: (stop(), reach("closing", wait=True))


def _launch(case: Case, folder: Path, codes: Path) -> None:
    """Start the ranks, and wait for them; serve their store where that is asked for."""
    from torch.distributed import TCPStore

    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    store = None
    if case.agent:
        options = {"wait_for_workers": False, "master_listen_fd": listener.detach()}
        store = TCPStore("127.0.0.1", port, None, True, timedelta(seconds=30), **options)
    listener.close()
    ranks = {fork(folder / f"log{r}", _rank, case, r, port, folder): r for r in range(SIZE)}
    (folder / "pids.partial").write_text(json.dumps(list(ranks)))
    (folder / "pids.partial").rename(folder / "pids")
    found = [0] * SIZE
    for _ in range(SIZE):
        pid, status = os.wait()
        found[ranks[pid]] = os.waitstatus_to_exitcode(status)
    codes.write_text(json.dumps(found))
    del store


def _strike(case: Case, pids: dict[str, int], later: list[subprocess.Popen[bytes]]) -> None:
    for who, deed in case.deeds.items():
        os.kill(pids[who], signal.SIGKILL if deed == "kill" else signal.SIGSTOP)
        if deed.startswith("pause"):
            seconds = deed.split()[1]
            later.append(subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {pids[who]}"]))
        time.sleep(case.later)


def _is_over(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):  # gone before it was opened, or read
        return True


def _one(case: Case) -> dict[str, Any]:
    later: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as name:
        folder, codes = Path(name), Path(name, "codes")
        launcher = fork(folder / "launcher", _launch, case, folder, codes)
        marks = [folder / "pids", *(folder / f"at{rank}" for rank in range(SIZE))]
        assert _until(lambda: all(mark.exists() for mark in marks)), [
            (folder / f"log{rank}").read_text() for rank in range(SIZE)
        ]
        pids = dict(zip(map(str, range(SIZE)), json.loads((folder / "pids").read_text()),
                        strict=True)) | {"launcher": launcher}  # fmt: skip
        time.sleep(case.delay)
        struck = time.monotonic()
        _strike(case, pids, later)
        (folder / "struck").touch()
        others = [pid for who, pid in pids.items() if who not in (*case.deeds, "launcher")]
        ended = _until(lambda: all(map(_is_over, others)))
        seconds = time.monotonic() - struck
        woken = _until(lambda: _is_over(launcher), 5.0)
        for who, pid in pids.items() if not woken else ():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT if who == "launcher" else signal.SIGKILL)
        os.waitpid(launcher, 0)
        logs = [(folder / f"log{rank}").read_text().splitlines() for rank in range(SIZE)]
        told = json.loads(codes.read_text()) if ended and codes.exists() else [None] * SIZE
    for process in later:
        process.wait()
    return {
        "codes": told,
        "said": [[x for x in log if x.startswith("foldcp: ")] for log in logs],
        "noise": [sum(x.startswith("Traceback") for x in log) for log in logs],
        "seconds": seconds,
        "woken": woken,
    }


def main() -> None:
    """Run the cases that standard input names."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    import foldcp.boltz.command.guarded
    import foldcp.fabric.exchange.autograd
    import foldcp.fabric.mesh  # noqa: F401

    cases = {name: Case(**case) for name, case in json.load(sys.stdin).items()}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        print(json.dumps(dict(zip(cases, pool.map(_one, cases.values()), strict=True))))


if __name__ == "__main__":
    main()
