"""Let ranks meet and exchange small values through the launcher's store.

Unlike collectives of torch.distributed these wait as long as it takes (reading inputs may take rank
0 hours), and join ranks of different data-parallel groups.
"""

from __future__ import annotations

import datetime
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from foldcp.errors import UserError
from foldcp.runtime.place import Place

if TYPE_CHECKING:
    from foldcp.runtime.liveness.guard import Guard

_FIRST, _POLL = 0.005, 0.25  # seconds between two looks, at first and after a while
_PATIENT = 10.0  # seconds until a rank that waits for others to start says for whom
_HEARING = 1.5  # seconds that a rank waits for the first one that failed to say why
_TURN = 0.5  # seconds between the ranks that find that none has said why all end

_served: dict[tuple[str, int], Any] = {}  # stores that this process serves, by address


def open_store(place: Place, serve: bool, seconds: float, guard: Guard) -> Any:
    """Connect to the store.

    Args:
        place: this process among the ranks.
        serve: be the one that the others connect to.
        seconds: to wait for it.
        guard: of this process.

    Raises:
        UserError: it was not reached in time.
    """
    from torch.distributed import DistError, TCPStore

    from foldcp.runtime.store.sealed_store import SealedStore, listen

    address = place.host, place.port
    serve = serve and address not in _served  # it goes on serving until this process ends
    notice = threading.Timer(_PATIENT, _say, (f"rank {place.rank} waits for rank 0 {place.at()}",))
    notice.daemon = True
    # One voice for each machine.
    if not serve and not place.agent_store and (place.local_rank == 0 or place.rank == 1):
        notice.start()
    unmet = (
        f"rank {place.rank} of {place.world} ({place.launcher}) could not meet {place.server} at "
        f"{place.host}:{place.port} within {seconds:.0f} s: check that all ranks were started, "
        "that none is stopped, and that this address is free and reachable, or set MASTER_ADDR "
        "and MASTER_PORT"
    )
    try:
        # Connecting has a deadline, but not what follows, where who serves it is stopped.
        with guard.asking(place.server, seconds + 1, unmet):
            if not serve:
                _reach(place.host, place.port, seconds)
            store = TCPStore(
                place.host,
                place.port,
                place.world,
                serve,
                timeout=datetime.timedelta(seconds=seconds),
                wait_for_workers=False,
                master_listen_fd=listen(place.host, place.port) if serve else None,
            )
    except (DistError, OSError) as error:
        raise UserError(f"{unmet} ({str(error).splitlines()[0]})") from error
    finally:
        notice.cancel()
    if serve:
        _served[address] = store
    return SealedStore(place.prefix, store, guard, f"the store that {place.server} serves")


def _reach(host: str, port: int, seconds: float) -> None:
    """Wait until somebody listens there; waiting itself, torch prints the stack of its C++ calls.

    Raises:
        OSError: nobody did in time.
    """
    until = time.monotonic() + seconds
    while True:
        left = until - time.monotonic()
        try:
            socket.create_connection((host, port), max(left, _POLL)).close()
            return
        except OSError:
            if left <= _POLL:
                raise
        time.sleep(_POLL)


def spoken(store: Any) -> None:
    """Note that some rank has said why all ranks end."""
    with suppress(RuntimeError):  # the store is gone
        store.set("said", "1")


def unheard(store: Any) -> bool:
    """Tell whether this rank waited in vain for another one to say why all end.

    Ranks that wait come to speak one after the other: the second says it only where the first was
    lost before it could.

    Raises:
        RuntimeError: the store is gone.
    """
    for turn in (lambda: _HEARING, lambda: _TURN * (store.add("unheard", 1) - 1)):
        until = time.monotonic() + turn()
        while not store.check(["said"]):
            if time.monotonic() > until:
                break
            time.sleep(_FIRST)
        else:
            return False
    return True


class Meetings:
    """Meetings of all ranks; each is held by all in the same order.

    Args:
        place: this process among the ranks. With more than one, `store` must be set.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.store: Any = None
        self._held = 0

    @property
    def is_root(self) -> bool:
        """True on rank 0."""
        return self.place.rank == 0

    def wait_for_root(self) -> None:
        """Wait until rank 0 gets here too, however long its work takes; rank 0 does not wait."""
        self.from_root(None)

    def from_root(self, value: Any) -> Any:
        """Rank 0's value on every rank, however long its work takes; rank 0 does not wait."""
        if self.place.world == 1:
            return value
        key = self._key("root")
        if self.is_root:
            self.store.put(key, value)
            return value
        _until(lambda: self.store.check([key]))
        return self.store.take(key)

    def gather(self, value: Any, idle: Callable[[], None] | None = None) -> list[Any]:
        """Gather the values of all ranks on every rank, in rank order.

        Args:
            value: of this rank.
            idle: is called now and then while others are waited for.
        """
        if self.place.world == 1:
            return [value]
        key = self._key("all")
        self.store.put(f"{key}/{self.place.rank}", value)
        keys = [f"{key}/{rank}" for rank in range(self.place.world)]
        first = self._held == 1
        late = (lambda: self._say_who(keys)) if first else None
        _until(lambda: self.store.check(keys), late, idle)
        return [self.store.take(k) for k in keys]

    def _say_who(self, keys: list[str]) -> None:
        """Say which ranks have not started; one rank speaks."""
        missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
        if missing and self.place.rank == min({*range(len(keys))} - {*missing}):
            named = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
            _say(f"waiting for {named} {self.place.at()}")

    def meet(self, key: str, count: int) -> None:
        """Wait until `count` ranks are here; the watch over the ranks ends the run if one is lost.

        Args:
            key: names the meeting, and is used once.
            count: ranks that meet.
        """
        self.store.add(key, 1)
        _until(lambda: self.store.add(key, 0) >= count)

    def part(self, seconds: float) -> None:
        """Hold the last meeting: use the store no more; its server waits a while for the others."""
        self.store.add("parted", 1)
        end = time.monotonic() + seconds

        def over() -> bool:
            # Who has failed does not come any more.
            gone = time.monotonic() > end or self.store.check(["failed"])
            return gone or self.store.add("parted", 0) >= self.place.world

        _until(over)

    def _key(self, kind: str) -> str:
        self._held += 1
        return f"{kind}/{self._held}"


def _until(
    happened: Callable[[], bool],
    late: Callable[[], None] | None = None,
    idle: Callable[[], None] | None = None,
) -> None:
    pause, begun = _FIRST, time.monotonic()
    while not happened():
        if idle is not None:
            idle()
        if late is not None and time.monotonic() - begun > _PATIENT:
            late()
            late = None
        time.sleep(pause)
        pause = min(_POLL, 1.5 * pause)


def _say(message: str) -> None:
    print(f"foldcp: {message}", file=sys.stderr, flush=True)
