"""Watch the other ranks: when one has failed or is lost, this rank ends with all of them."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

from foldcp.config import Config
from foldcp.errors import on_disk
from foldcp.fabric.message import Forged
from foldcp.runtime.liveness.guard import Guard, hear
from foldcp.runtime.place import Place
from foldcp.runtime.store.meetings import Meetings, spoken, unheard

if TYPE_CHECKING:
    from foldcp.fabric.mesh import Mesh
    from foldcp.runtime.liveness.peers import Peers

_POLL = 0.25  # seconds
_LAST_WORDS = 3.0  # seconds that the rank that serves the store waits for others to read it


class Watch(Meetings):
    """The watch of one rank over the run; `foldcp.runtime.session.Session` begins it.

    Attributes:
        mesh: this rank's; None until it has one.
        group: data-parallel group of this rank.
        groups: number of groups.
        epoch: how often the ranks of this group have been joined again.
        patience: seconds that a rank may be silent before all give up.
        stage: what this rank is doing.
        serves: it serves the store.
        interrupted: set after Ctrl-C: later failures are consequences of it.
        guard: ends this process in time.
        peers: the others as this rank sees them.
    """

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.mesh: Mesh | None = None
        self.group, self.groups, self.epoch = 0, 1, 0
        self.patience = float(Config.timeout)
        self.peers: Peers | None = None
        self._watched: Any  # store and thread, from when the ranks have met
        self._watcher: threading.Thread
        self.serves, self.interrupted = False, threading.Event()
        self.stage, self._heard = "starting", ""
        self._over = threading.Event()
        self.guard = Guard(lambda: self.patience, self._overdue, self._spread)

    def _end(self, store: Any, message: str, code: int = 1) -> NoReturn:
        """End this rank, and all others with it; one of them says why.

        The message is printed here unless another rank is known to have printed it.

        Args:
            store: to tell the others.
            message: why; "" where another rank is to say it.
            code: exit code.
        """
        assert self.peers is not None
        at = f"{self.place.host}:{self.place.port}"
        untold = f"a rank failed and could not say why, or a stranger writes to {at}, all ranks end"
        if message and self.guard.stopped >= self.patience:  # of which the rest may follow
            message = (
                f"rank {self.place.rank} was stopped for {self.guard.stopped:.0f} s; {message}"
            )
        self.guard.claim(message or f"{untold}; {on_disk()}", code)
        self._over.set()
        try:
            if store.add("failed", 1) == 1 or unheard(store):
                self.guard.say()
                spoken(store)
            else:
                hear()
            self.peers.wake()
            store.add("left", 1)
            until = time.monotonic() + (_LAST_WORDS if self.serves else 0.0)
            while time.monotonic() < until and store.add("left", 0) < self.place.world:
                time.sleep(_POLL)
        except RuntimeError:  # the store is gone, and with it the rank that served it
            if not message:
                self.guard.revise(self.peers.lost_store())
            self.peers.wake()
        self.guard.end()

    def _watch(self) -> None:
        message: str | None = None
        assert self.peers is not None
        while message is None and not self._over.wait(_POLL):
            try:
                message = self._noticed(self._watched)
            except Forged as error:
                message = f"{error}, all ranks end; {on_disk()}"
            except RuntimeError:
                if not self._over.wait(2 * _POLL):
                    message = self.peers.lost_store()
        if message is not None:
            self._end(self._watched, message)

    def _noticed(self, store: Any) -> str | None:
        """Return why all ranks end, "" where another one says it; None while they do not."""
        assert self.peers is not None
        if store.check(["failed"]):
            return ""
        after = (self.place.rank + 1) % self.place.world
        self.peers.beat()
        self._hear_of_fault(store)
        lost = self.peers.lost(after, self.patience)
        if lost is None or store.check([f"departed/{after}"]):
            return None
        return f"{lost}, all ranks end; {on_disk()}"

    def _overdue(self, what: str, seconds: float) -> str:
        text = f"waited {seconds:.0f} s (FOLDCP_TIMEOUT) for {what}"
        if self.peers is None:
            return f"rank {self.place.rank} {text}: it does not answer, start all ranks again"
        return self.peers.account(text)

    def _spread(self) -> None:
        """Tell the others of an end that was decided without them."""
        if self.peers is not None:
            self.peers.wake()
        with suppress(RuntimeError, AttributeError):  # the store is gone, or there was none yet
            self.store.add("failed", 1)
            spoken(self.store)

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
        """Key under which a rank of this group leaves why the input in progress is dropped."""
        return f"fault/{self.group}/{self.epoch}"

    def _stop_watching(self) -> None:
        """End the watcher: Python aborts when it exits while a thread is inside the store."""
        self._over.set()
        self._watcher.join()
