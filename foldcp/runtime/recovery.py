"""Recover from a fault that costs one input: all ranks drop it, are joined again and go on.

The rank that runs out of memory leaves word in the store, then its exchanges and its process group:
the others fail in whatever they wait for, find the word, and leave too. Once all have, new
communicators are made and the next input is begun. Everything else that fails ends the run.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from foldcp.config import Config
from foldcp.errors import InputLost, TransportError, is_out_of_memory
from foldcp.fabric.mesh import Mesh
from foldcp.fabric.transport.engine_transport import EngineTransport
from foldcp.runtime.report import out_of_memory
from foldcp.runtime.session import Session

Result = TypeVar("Result")

_HEARING = 3.0  # seconds in which the reason of a broken exchange must turn up
_POLL = 0.05  # seconds
_BROKEN = ("closed by peer", "reset by peer", "broken pipe", "timed out", "connection refused")


class Run(Protocol):
    """Name what recovery asks of the prediction under way."""

    config: Config
    session: Session
    mesh: Mesh
    failed: dict[str, str]  # inputs that are dropped, and why

    @property
    def shared(self) -> bool:
        """True when all ranks of the mesh work on the model under way together."""


class Input(Protocol):
    """Name what recovery asks of the input under way; what is known of it may grow meanwhile."""

    @property
    def name(self) -> str:
        """The name of the input."""

    @property
    def tokens(self) -> int:
        """N, 0 while it is not known."""


def together(run: Run, one: Input, work: Callable[[], Result]) -> Result | None:
    """Do all of one input's prediction on all ranks of the group, or drop the input on all.

    Args:
        run: the prediction.
        one: the input.
        work: this rank's part. The others' must exchange the same things.

    Returns:
        What `work` returns; None when the input was dropped, `run.failed` says why.

    Raises:
        Exception: what `work` raises, unless some rank of the group ran out of memory.
    """
    reason: str | None
    try:
        result = work()
        if run.shared:
            run.mesh.ranks.barrier()
        return result
    except InputLost as error:  # alike on all ranks, which are still joined
        reason, joined = str(error), True
    except Exception as error:
        reason, joined = _own(run, one.tokens, error) or _heard(run, error), False
        if reason is None:
            raise
    # Out of the handler: its traceback held the tensors of the input.
    _release()
    if run.shared and not joined:
        _rejoin(run, reason)
    run.failed[one.name] = reason
    return None


def _own(run: Run, tokens: int, error: Exception) -> str | None:
    """Publish that this rank ran out of memory; returns the first such message of any rank."""
    if isinstance(error, TransportError) or not is_out_of_memory(error):
        return None
    session = run.session
    text = out_of_memory(error, run.mesh, session.stage, tokens)
    if not run.shared:
        return text
    first = session.store.compare_set(session.fault_key, "", json.dumps(text))
    return str(json.loads(first))


def _heard(run: Run, error: Exception) -> str | None:
    """Return the reason why another rank left the exchange that failed here; None if none did."""
    if not run.shared or not is_broken(error):
        return None
    store, key = run.session.store, run.session.fault_key
    until = time.monotonic() + _HEARING
    while not store.check([key]):
        if time.monotonic() > until:
            return None
        time.sleep(_POLL)
    return str(json.loads(store.get(key)))


def is_broken(error: BaseException) -> bool:
    """Tell whether an error says that an exchange with other ranks broke."""
    broken = isinstance(error, (TransportError, dist.DistError))
    return broken or any(part in str(error).lower() for part in _BROKEN)


def _release() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _rejoin(run: Run, reason: str) -> None:
    """Leave what joined the ranks, wait until all have, and join them again."""
    session, mesh = run.session, run.mesh
    link = mesh.leave(reason)
    assert link is not None
    if not isinstance(link, EngineTransport):
        link.exchanges.broken.clear()
    abort = getattr(dist.distributed_c10d, "_abort_process_group", None)
    if mesh.device.type == "cuda" and abort is not None:
        abort()
    else:
        dist.destroy_process_group()
    session.meet(f"{session.fault_key}/left", mesh.size)
    if isinstance(link, EngineTransport):
        link.close()
        link.exchanges.broken.clear()  # the engine wrote into their memory until now
    _release()
    session.epoch += 1
    mesh.rejoin(session.form(mesh.rows, mesh.cols, mesh.device, run.config))
    session.mesh = mesh
