"""Hold the ranks of one run together: they meet, and when one fails all end within seconds.

Every rank watches one key of the launcher's store. The first rank to fail writes it and prints its
message; the others end without a word once they know that it was said, even from inside a
collective that would never return. Each rank also watches the next one, so that a rank which is
killed or stopped is missed and named; `foldcp.runtime.liveness.guard` ends a rank that cannot reach
the store.
"""

from __future__ import annotations

import atexit
import datetime
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NoReturn

from foldcp.config import Config, order_nccl, secret
from foldcp.errors import UserError
from foldcp.fabric.message import use_secret
from foldcp.runtime.liveness.guard import end_process, say
from foldcp.runtime.liveness.signals import end_on_signals
from foldcp.runtime.liveness.watch import Watch
from foldcp.runtime.place import Place, on_one_machine
from foldcp.runtime.store.meetings import open_store

if TYPE_CHECKING:
    import torch

    from foldcp.fabric.mesh import Mesh

MEETING_TIME = 120.0  # seconds for all ranks to reach rank 0's store
_ROOT_FIRST = 0.75  # seconds that rank 0 is given to report what several ranks noticed
_PARTING = 10.0  # seconds that the rank that serves the store waits for others at a good end


@dataclass
class _Process:
    """Hold what is known of the runs of this process.

    The guard of Boltz's command, and whoever ends the ranks before there is a run, come from
    anywhere with nothing in hand: so this is process-wide, and nothing else here is.

    Args:
        session: under way.
        begun: sessions so far.
        unreachable: rank 0's store was not reached in an earlier attempt.
    """

    session: Session | None = None
    begun: int = 0
    unreachable: bool = False


_process = _Process()


def start(place: Place, meeting_time: float = MEETING_TIME, signals: bool = True) -> Session:
    """Join the run of this process, once.

    Args:
        place: this process among the ranks.
        meeting_time: seconds to wait for rank 0's store.
        signals: such as SIGTERM end the run while it lasts.

    Returns:
        The session; the same one when it was already started.

    Raises:
        UserError: rank 0's store was not reached in time.
    """
    if _process.session is None:
        _process.begun += 1
        # Of a program that predicts several times: the keys of each run are its own.
        if _process.begun > 1:
            place = replace(place, prefix=f"{place.prefix}/{_process.begun}")
        with suppress(ValueError):  # `Config.from_env` tells once the ranks have met
            use_secret(secret(os.environ))
        try:
            _process.session = Session(place, meeting_time, signals)
        except RuntimeError as error:
            _process.unreachable = True
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"rank {place.rank} lost {place.server}, which serves the store, when it joined"
            ) from error
    return _process.session


def current() -> Session | None:
    """Return the session of this process, None outside of a run."""
    return _process.session


def forget() -> None:
    """Leave the session of a rank that is alone; the next `start` begins another."""
    _process.session = None


def end(message: str, code: int = 1) -> NoReturn:
    """End every rank; the message is printed once, by rank 0 if it fails, too.

    Args:
        message: what went wrong and what to do.
        code: exit code of this rank.
    """
    try:
        if not _process.unreachable:
            start(Place.find(os.environ), meeting_time=5.0).fail(message, code)
    except UserError:
        pass  # this rank can reach no other: it speaks for itself
    say(message)
    raise SystemExit(code)


def leave(code: int = 0) -> NoReturn:
    """Exit a rank whose work is done; the session must be closed."""
    if Place.find(os.environ).world > 1:
        if _process.session is not None:
            with suppress(RuntimeError):  # who serves the store has left first
                _process.session.depart()
        # Not sys.exit: while anything still refers to the destroyed process group, its threads
        # abort an interpreter that shuts down ("terminate called"), in one exit of ten.
        end_process(code)
    sys.exit(code)


class Session(Watch):
    """The ranks of one run. Made by `start`."""

    def __init__(self, place: Place, meeting_time: float, signals: bool = True) -> None:
        super().__init__(place)
        self._leave_signals: Callable[[], None] = lambda: None
        with suppress(ValueError):  # reported once the ranks have met
            self.patience = float(Config.from_env(os.environ).timeout)
        if signals:
            self._leave_signals = end_on_signals(self)
        if place.world == 1:
            return
        from foldcp.runtime.liveness.peers import Peers

        self.guard.start()
        self.serves = place.rank == 0 and not place.agent_store
        self.store, self._watched, own = (
            open_store(place, serve, meeting_time, self.guard)
            for serve in (self.serves, False, False)
        )
        self.peers = Peers(
            own, place, lambda: self.stage, self.guard.clock,
            lambda: self.mesh is not None and self.mesh.waiting,
        )  # fmt: skip
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        atexit.register(self._stop_watching)

    def at(self, stage: str) -> None:
        """Record the current stage so that error messages, on any rank, can name it."""
        new, self.stage = stage != self.stage, stage
        if new and self.peers is not None:
            with suppress(RuntimeError):  # the watching thread notices that the store is gone
                self.peers.beat(now=True)

    def form(self, rows: int, cols: int, device: torch.device, config: Config) -> Mesh:
        """Start torch.distributed for this rank's group and join its ranks to a mesh.

        Groups are worlds of their own: they only meet in the store.

        Args:
            rows: R of one group.
            cols: Q of one group.
            device: of this rank.
            config: transport, route, strategies, and seconds that a collective may take.

        Raises:
            TransportError: on every rank of the group: the transport cannot run here.
        """
        import torch
        import torch.distributed as dist

        from foldcp.fabric.connect import Options
        from foldcp.fabric.mesh import Mesh
        from foldcp.runtime.store.loopback import keep_gloo_here

        size = rows * cols
        if size > 1:
            if device.type == "cuda":
                torch.cuda.set_device(device)
                order_nccl(os.environ)
            if on_one_machine(os.environ) and not os.environ.get("GLOO_SOCKET_IFNAME"):
                keep_gloo_here(os.environ)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=dist.PrefixStore(f"group/{self.group}/{self.epoch}", self.store),
                rank=self.place.rank % size,
                world_size=size,
                timeout=datetime.timedelta(seconds=config.timeout),
            )
        options = Options(config.timeout, config.nccl_library, config.nccl_ctas)
        self.mesh = Mesh.create(
            rows, cols, device, config.route, config.transport, options, wire=config.wire,
            multiplication=config.multiplication, attention=config.attention,
            graphs=config.graphs, memory=config.memory, **_formats(config, device.type),
        )  # fmt: skip
        return self.mesh

    def close(self) -> None:
        """End well, together with all other ranks."""
        if self.place.world > 1:
            import torch.distributed as dist

            self.at("closing")
            # All have come here: what follows is short, and near its end nobody watches any more.
            with self.guard.asking("the other ranks to part"):
                self.depart()
                self.gather(None)
                self._stop_watching()
                if self.mesh is not None:
                    self.mesh.close()
                if dist.is_initialized():
                    dist.destroy_process_group()
                if self.mesh is not None:
                    self.mesh.forget()  # or threads of the group abort the end of the process
            self.part(_PARTING if self.serves else 0.0)
            self.guard.stand_down()
            atexit.unregister(self._stop_watching)
        self._leave_signals()
        _process.session = None

    def depart(self) -> None:
        """Tell the others that the end of this process will not be a loss."""
        self.store.set(f"departed/{self.place.rank}", "1")

    def fail(self, message: str, code: int = 1) -> NoReturn:
        """End every rank now; see `end`.

        Args:
            message: what went wrong and what to do.
            code: exit code of this rank.
        """
        if self.place.world == 1:
            say(message)
            if threading.current_thread() is threading.main_thread():
                raise SystemExit(code)
            end_process(code)
        if not self.is_root:
            time.sleep(_ROOT_FIRST)
        self._end(self.store, message, code)


def _formats(config: Config, device_type: str) -> dict[str, str]:
    """Return what a mesh's policy takes of the formats that the variables ask for."""
    table = config.precision_on(device_type)
    contraction = "fp8" if table.contraction == "fp8" else "same"
    groups = {"single": table.single, "tokens": table.tokens, "atoms": table.atoms}
    return groups | {"contraction": contraction}
