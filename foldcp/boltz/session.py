"""How the ranks of one run stay together: they meet, and when one fails all end within seconds.

Every rank watches one key of the launcher's store. The first rank to fail writes it and prints its
message; the others end without a word, even from inside a collective that would never return.
"""

from __future__ import annotations

import atexit
import datetime
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, NoReturn

from foldcp.boltz.launch import Place
from foldcp.config import Config
from foldcp.report import UserError

if TYPE_CHECKING:
    import torch

    from foldcp.mesh import Mesh

MEETING_TIME = 120.0  # seconds for all ranks to reach rank 0's store
_POLL = 0.25  # seconds
_ROOT_FIRST = 0.75  # seconds that rank 0 is given to report what several ranks noticed
_LAST_WORDS = 3.0  # seconds that the rank that serves the store waits for others to read it

_current: Session | None = None
_unreachable = False  # rank 0's store, in an earlier attempt of this process


def start(place: Place, meeting_time: float = MEETING_TIME) -> Session:
    """Join the run of this process, once.

    Args:
        place: this process among the ranks.
        meeting_time: seconds to wait for rank 0's store.

    Returns:
        The session; the same one when it was already started.

    Raises:
        UserError: rank 0's store was not reached in time.
    """
    global _current, _unreachable
    if _current is None:
        try:
            _current = Session(place, meeting_time)
        except UserError:
            _unreachable = True
            raise
    return _current


def end(message: str, code: int = 1) -> NoReturn:
    """End every rank; the message is printed once, by rank 0 if it fails likewise.

    Args:
        message: what went wrong and what to do.
        code: exit code of this rank.
    """
    try:
        if not _unreachable:
            start(Place.find(os.environ), meeting_time=5.0).fail(message, code)
    except UserError:
        pass  # this rank can reach no other: it speaks for itself
    _say(message)
    raise SystemExit(code)


def leave(code: int = 0) -> NoReturn:
    """Exit a rank whose work is done; the session must be closed."""
    if Place.find(os.environ).world > 1:
        # Not sys.exit: while anything still refers to the destroyed process group, its threads
        # abort an interpreter that shuts down ("terminate called"), in one exit of ten.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


class Session:
    """The ranks of one run. Made by `start`."""

    def __init__(self, place: Place, meeting_time: float) -> None:
        self.place = place
        self.mesh: Mesh | None = None
        self._meetings = 0
        self._over = threading.Event()
        if place.world == 1:
            return
        self.serves = place.rank == 0 and not place.agent_store
        self._store = self._connect(self.serves, meeting_time)
        watched = self._connect(False, meeting_time)
        self._watcher = threading.Thread(target=self._watch, args=(watched,), daemon=True)
        self._watcher.start()
        atexit.register(self._stop_watching)
        self._end_on_sigterm()

    def _connect(self, serve: bool, seconds: float) -> Any:
        from torch.distributed import DistError, PrefixStore, TCPStore

        place = self.place
        try:
            store = TCPStore(
                place.host,
                place.port,
                place.world,
                serve,
                timeout=datetime.timedelta(seconds=seconds),
                wait_for_workers=False,
            )
        except DistError as error:
            raise UserError(
                f"rank {place.rank} of {place.world} ({place.launcher}) could not meet rank 0 at "
                f"{place.host}:{place.port} within {seconds:.0f} s: check that all ranks were "
                "started and that this address is free and reachable, or set MASTER_ADDR and "
                f"MASTER_PORT ({str(error).splitlines()[0]})"
            ) from error
        return PrefixStore(place.prefix, store)

    @property
    def is_root(self) -> bool:
        """True on rank 0."""
        return self.place.rank == 0

    def form(self, rows: int, cols: int, device: torch.device, config: Config) -> Mesh:
        """Start torch.distributed and lay the ranks out as a mesh, without a transport for tiles.

        Args:
            rows, cols: R and Q.
            device: of this rank.
            config: route, strategies, and seconds that a collective may take.
        """
        import torch
        import torch.distributed as dist

        from foldcp.mesh import Mesh

        if self.place.world > 1 and not dist.is_initialized():
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=dist.PrefixStore("group", self._store),
                rank=self.place.rank,
                world_size=self.place.world,
                timeout=datetime.timedelta(seconds=config.timeout),
            )
        self.mesh = Mesh.create(
            rows, cols, device, config.route, transport=None, wire=config.wire,
            multiplication=config.multiplication, attention=config.attention,
        )  # fmt: skip
        return self.mesh

    def connect(self, config: Config) -> Mesh:
        """Set up what carries tiles between the ranks; they must have been started alike.

        Args:
            config: the transport and its options.

        Raises:
            TransportError: on every rank: it cannot run here.
        """
        from foldcp.connect import Options

        assert self.mesh is not None
        options = Options(config.timeout, config.nccl_library, config.nccl_ctas)
        self.mesh = self.mesh.connected(config.transport, options)
        return self.mesh

    def wait_for_root(self) -> None:
        """Wait until rank 0 gets here too, however long its work takes; rank 0 does not wait."""
        if self.place.world == 1:
            return
        key = f"root/{self._meetings}"
        self._meetings += 1
        if self.is_root:
            self._store.set(key, "1")
        while not self.is_root and not self._store.check([key]):
            time.sleep(_POLL)

    def close(self) -> None:
        """End well, together with all other ranks."""
        global _current
        if self.place.world > 1:
            import torch.distributed as dist

            self._stop_watching()
            if self.mesh is not None:
                self.mesh.close()
            if dist.is_initialized():
                dist.destroy_process_group()
        _current = None

    def fail(self, message: str, code: int = 1) -> NoReturn:
        """End every rank now; see `end`."""
        if self.place.world == 1:
            _say(message)
            raise SystemExit(code)
        self._over.set()
        if not self.is_root:
            time.sleep(_ROOT_FIRST)
        try:
            first = self._store.add("failed", 1) == 1
        except RuntimeError:  # the store is gone: the rank that served it has failed first
            first = False
        if first:
            _say(message)
        self._leave(self._store, code)

    def _watch(self, store: Any) -> None:
        while not self._over.wait(_POLL):
            try:
                if not store.check(["failed"]):
                    continue
                store.add("failed", 1)
            except RuntimeError:
                if self._over.wait(2 * _POLL):
                    return
            self._leave(store, 1)

    def _stop_watching(self) -> None:
        """End the watcher: Python aborts when it exits while a thread is inside the store."""
        self._over.set()
        self._watcher.join()

    def _leave(self, store: Any, code: int) -> NoReturn:
        sys.stdout.flush()
        sys.stderr.flush()
        until = time.monotonic() + (_LAST_WORDS if self.serves else 0.0)
        while time.monotonic() < until and store.add("failed", 0) < self.place.world:
            time.sleep(_POLL)
        # Not sys.exit: threads of a broken process group would hold the process for minutes.
        os._exit(code)

    def _end_on_sigterm(self) -> None:
        """Make SIGTERM end this process even while it waits inside a collective.

        Lightning replaces the default action by a Python handler, which would only run once the
        collective returns; torchrun would kill the process 30 s later.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

        def wait() -> None:
            while True:
                if signal.SIGTERM in os.read(reader, 1):
                    os._exit(128 + signal.SIGTERM)

        threading.Thread(target=wait, daemon=True).start()


def _say(message: str) -> None:
    sys.stdout.flush()
    print(f"foldcp: {message}", file=sys.stderr, flush=True)
