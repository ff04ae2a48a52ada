"""How the ranks of one run stay together: they meet, and when one fails all end within seconds.

Every rank watches one key of the launcher's store. The first rank to fail writes it and prints its
message; the others end without a word, even from inside a collective that would never return. Each
rank also watches the next one, so that a rank which is killed or stopped is missed and named.
"""

from __future__ import annotations

import atexit
import datetime
import multiprocessing
import os
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

from foldcp.boltz.lock import release_soon
from foldcp.boltz.meetings import Meetings, open_store, spoken, unheard
from foldcp.boltz.place import Place, on_one_machine
from foldcp.boltz.signals import end_on_signals
from foldcp.config import Config, order_nccl, secret
from foldcp.message import Forged, use_secret
from foldcp.report import KEPT, UserError

if TYPE_CHECKING:
    import torch

    from foldcp.boltz.peers import Peers
    from foldcp.mesh import Mesh

MEETING_TIME = 120.0  # seconds for all ranks to reach rank 0's store
_POLL = 0.25  # seconds
_ROOT_FIRST = 0.75  # seconds that rank 0 is given to report what several ranks noticed
_LAST_WORDS = 3.0  # seconds that the rank that serves the store waits for others to read it
_STORE_TIME = 10.0  # seconds that the store may take to answer a rank that ends

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
        with suppress(ValueError):  # `Config.from_env` tells once the ranks have met
            use_secret(secret(os.environ))
        try:
            _current = Session(place, meeting_time)
        except UserError:
            _unreachable = True
            raise
    return _current


def current() -> Session | None:
    """The session of this process, None outside of a run."""
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
        if _current is not None:
            _current.depart()
        # Not sys.exit: while anything still refers to the destroyed process group, its threads
        # abort an interpreter that shuts down ("terminate called"), in one exit of ten.
        _exit(code)
    sys.exit(code)


class Session(Meetings):
    """The ranks of one run. Made by `start`.

    Attributes:
        place: this process among the ranks. mesh: this rank's; None until `form`.
        group, groups: data-parallel group of this rank, and their number.
        patience: seconds that a rank may be silent before all give up.
        stage: what this rank is doing.
        epoch: how often the ranks of this group have been joined anew.
    """

    def __init__(self, place: Place, meeting_time: float) -> None:
        super().__init__(place)
        self.mesh: Mesh | None = None
        self.group, self.groups, self.epoch = 0, 1, 0
        self.patience = float(Config.timeout)
        self.peers: Peers | None = None
        self.stage, self._heard = "starting", ""
        self._over = threading.Event()
        end_on_signals(self)
        if place.world == 1:
            return
        from foldcp.boltz.peers import Peers

        self.serves = place.rank == 0 and not place.agent_store
        self.store = open_store(place, self.serves, meeting_time)
        self._watched = open_store(place, False, meeting_time)
        self.peers = Peers(open_store(place, False, meeting_time), place, lambda: self.stage)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        atexit.register(self._stop_watching)

    def at(self, stage: str) -> None:
        """Say what this rank is doing, for messages, also those of other ranks."""
        new, self.stage = stage != self.stage, stage
        if new and self.peers is not None:
            with suppress(RuntimeError):  # the watching thread notices that the store is gone
                self.peers.beat(now=True)

    def form(self, rows: int, cols: int, device: torch.device, config: Config) -> Mesh:
        """Start torch.distributed for this rank's group and join its ranks to a mesh.

        Groups are worlds of their own: they only meet in the store.

        Args:
            rows, cols: R and Q of one group.
            device: of this rank.
            config: transport, route, strategies, and seconds that a collective may take.

        Raises:
            TransportError: on every rank of the group: the transport cannot run here.
        """
        import torch
        import torch.distributed as dist

        from foldcp.boltz.loopback import keep_gloo_here
        from foldcp.connect import Options
        from foldcp.mesh import Mesh

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
        )  # fmt: skip
        return self.mesh

    def close(self) -> None:
        """End well, together with all other ranks."""
        global _current
        if self.place.world > 1:
            import torch.distributed as dist

            self.at("closing")
            self.depart()
            self.gather(None)
            self._stop_watching()
            if self.mesh is not None:
                self.mesh.close()
            if dist.is_initialized():
                dist.destroy_process_group()
            self.part(_STORE_TIME if self.serves else 0.0)
        _current = None

    def depart(self) -> None:
        """Tell the others that the end of this process will not be a loss."""
        self.store.set(f"departed/{self.place.rank}", "1")

    def fail(self, message: str, code: int = 1) -> NoReturn:
        """End every rank now; see `end`."""
        if self.place.world == 1:
            _say(message)
            if threading.current_thread() is threading.main_thread():
                raise SystemExit(code)
            _exit(code)
        self._over.set()
        threading.Thread(target=self._leave_anyway, args=(message, code), daemon=True).start()
        if not self.is_root:
            time.sleep(_ROOT_FIRST)
        if self._first():
            _say(message)
            spoken(self.store)
        self._leave(self.store, code)

    def _first(self, store: Any = None) -> bool:
        try:
            return (store or self.store).add("failed", 1) == 1
        except RuntimeError:  # the store is gone: the rank that served it has failed first
            return False

    def _leave_anyway(self, message: str, code: int) -> None:
        """End this process when the store's is stopped and does not answer."""
        time.sleep(_STORE_TIME)
        _say(message)
        _exit(code)

    def _watch(self) -> None:
        store, after = self._watched, (self.place.rank + 1) % self.place.world
        assert self.peers is not None
        while not self._over.wait(_POLL):
            lost, alone = None, False
            try:
                if store.check(["failed"]):
                    alone = unheard(store, _LAST_WORDS / 2)
                else:
                    self.peers.beat()
                    self._hear_of_fault(store)
                    lost = self.peers.lost(after, self.patience)
                    if lost is None or store.check([f"departed/{after}"]):
                        continue
                if store.add("failed", 1) > 1:
                    lost = None
            except Forged as error:
                lost = str(error) if self._first(store) else None
            except RuntimeError:
                if self._over.wait(2 * _POLL):
                    return
                _say(f"rank {self.place.rank} lost rank 0 or the launcher, which served the store")
            if alone:
                where = f"{self.place.host}:{self.place.port}"
                lost = f"a rank failed and could not say why, or a stranger writes to {where}"
            if lost is not None:
                _say(f"{lost}, all ranks end; {KEPT}")
                spoken(store)
            self._leave(store, 1)

    def _hear_of_fault(self, store: Any) -> None:
        """Make this rank's exchange fail when another rank drops the input under way."""
        link, key = None if self.mesh is None else self.mesh.link, self.fault_key
        if link is None or key == self._heard or not store.check([key]):
            return
        self._heard = key
        with suppress(RuntimeError):  # closed meanwhile
            link.abort("another rank drops this input")

    @property
    def fault_key(self) -> str:
        """Where a rank of this group leaves why the input under way is dropped."""
        return f"fault/{self.group}/{self.epoch}"

    def _stop_watching(self) -> None:
        """End the watcher: Python aborts when it exits while a thread is inside the store."""
        self._over.set()
        self._watcher.join()

    def _leave(self, store: Any, code: int) -> NoReturn:
        until = time.monotonic() + (_LAST_WORDS if self.serves else 0.0)
        while time.monotonic() < until and store.add("failed", 0) < self.place.world:
            time.sleep(_POLL)
        # Not sys.exit: threads of a broken process group would hold the process for minutes.
        _exit(code)


def _exit(code: int) -> NoReturn:
    """End this process and those that it started, without waiting for anything."""
    release_soon()
    with suppress(OSError):  # the terminal is gone
        sys.stdout.flush()
        sys.stderr.flush()
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def _say(message: str) -> None:
    with suppress(OSError):
        sys.stdout.flush()
        print(f"foldcp: {message}", file=sys.stderr, flush=True)
