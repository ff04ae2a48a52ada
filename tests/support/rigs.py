"""What goes wrong on cue inside the tiled model: "at PLACE WHAT RANK INPUT".

PLACE is one of `PLACES`, WHAT one of `DEEDS`: rank RANK does it when it gets there while it
predicts its INPUT-th input, once.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from foldcp.boltz.lightning import writers
from foldcp.fabric.exchange.autograd import Exchange
from foldcp.modules.confidence.module import ConfidenceModule
from foldcp.modules.diffusion.score_model import DiffusionModule
from foldcp.modules.model import FoldOnMesh
from foldcp.modules.trunk.pairformer import PairformerModule
from foldcp.runtime import session
from foldcp.runtime.session import Session

# Place -> (class, method, how many calls of it to let pass).
PLACES: dict[str, tuple[type, str, int]] = {
    "start": (FoldOnMesh, "trunk", 0),
    "trunk": (PairformerModule, "forward", 0),
    "ring": (Exchange, "wait", 40),
    "sampler": (DiffusionModule, "forward", 2),
    "confidence": (ConfidenceModule, "forward", 0),
    "writer": (writers.RootWriter, "_write", 0),
}


def _oom() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 is full.")


def _host_oom() -> None:
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")


def _full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _bug() -> None:
    raise RuntimeError("rigged to fail")


def _nap(seconds: float = 4) -> None:
    """Stop this process for some time, as a debugger or an overfull machine may."""
    pid = os.getpid()
    if os.fork() == 0:
        time.sleep(seconds)
        with suppress(ProcessLookupError):  # the others have woken it, and it has ended
            os.kill(pid, signal.SIGCONT)
        os._exit(0)
    os.kill(pid, signal.SIGSTOP)


DEEDS: dict[str, Callable[[], None]] = {
    "oom": _oom,
    "host-oom": _host_oom,
    "full": _full,
    "raise": _bug,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "nap": _nap,
    "long-nap": lambda: _nap(30),
    "term": lambda: os.kill(os.getppid(), signal.SIGTERM),
    "hang": lambda: time.sleep(1000),
}


def allow_files(count: int, start: str) -> None:
    """Let this process make that many files and folders whose paths begin so: a disk of few inodes.

    What is removed gives none back.
    """
    left = [count]

    def hook(event: str, told: tuple[Any, ...]) -> None:
        makes = event == "os.mkdir" or (event == "open" and (told[2] or 0) & os.O_CREAT)
        if makes and str(told[0]).startswith(start) and not os.path.exists(told[0]):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(told[0]))

    sys.addaudithook(hook)


def _note(what: str) -> None:
    """Leave the time of something on standard error; one clock serves all ranks."""
    print(f"rig: {what} {time.monotonic():.3f}", file=sys.stderr, flush=True)


def install(what: str) -> None:
    """Rig this process; see the module."""
    _, place, deed, rank, index = what.split()
    cls, name, calls = PLACES[place]
    state = {"input": -1, "calls": calls}
    predict, method = FoldOnMesh.__call__, getattr(cls, name)

    def counted(self: FoldOnMesh, *args: Any, **options: Any) -> Any:
        state["input"] += 1
        return predict(self, *args, **options)

    def rigged(self: Any, *args: Any, **options: Any) -> Any:
        here = session.current()
        if here is not None and here.place.rank == int(rank) and state["input"] == int(index):
            state["calls"] -= 1
            if state["calls"] == -1:
                _note("struck")
                DEEDS[deed]()
        return method(self, *args, **options)

    meet = Session.meet

    def met(self: Session, key: str, count: int) -> None:
        meet(self, key, count)
        if key.endswith("/left"):
            _note("agreed")

    Session.meet = met
    FoldOnMesh.__call__ = counted
    setattr(cls, name, rigged)
