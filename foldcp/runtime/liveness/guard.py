"""The end of a rank: one thread decides on it, one line says why, and nothing can hold it up.

A request to the launcher's store is a call into C++ without a deadline: where the process that
serves the store is stopped, or its machine has left the network, it never returns. The guard's
thread asks nobody. It looks how long what this process asks for has been under way, and ends the
process where that is too long.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import NoReturn

from foldcp.errors import is_command, on_disk
from foldcp.runtime.files.lock import release_soon

_TICK = 0.25  # seconds
_PAUSE = 2.0  # seconds between two ticks; what is longer is time that this process was stopped
_ENDING = 6.0  # seconds that an end may take once it is decided
_SOON = 1.0  # seconds for what an end does not depend on

# This process has said why it ends, or another rank has. Process-wide: a process ends once, with or
# without a session.
_silent = threading.Event()


class Guard:
    """Ends this process in time.

    Args:
        patience: seconds that a request may take; asked each time.
        account: says why all end, given what was waited for and how many seconds.
        spread: tells the other ranks, as far as it can; it may be held up.

    Attributes:
        stopped: the longest time in seconds that this process was stopped, 0 if it never was.
    """

    def __init__(
        self,
        patience: Callable[[], float],
        account: Callable[[str, float], str],
        spread: Callable[[], None],
    ) -> None:
        self.stopped = 0.0
        self._patience, self._account, self._spread = patience, account, spread
        self._ran, self._ticked = 0.0, time.monotonic()
        self._asked: dict[int, tuple[str, float, float | None, str]] = {}
        self._numbers, self._lock = count(), threading.Lock()
        self._claimed, self._down = threading.Lock(), False
        self._decided: tuple[str, int, float] | None = None

    def start(self) -> None:
        """Begin to watch."""
        threading.Thread(target=self._watch, daemon=True).start()

    def clock(self) -> float:
        """Return the seconds that this process has run, time while it was stopped not included."""
        return self._ran + min(time.monotonic() - self._ticked, _PAUSE)

    @contextmanager
    def asking(self, what: str, seconds: float | None = None, late: str = "") -> Iterator[None]:
        """Do in time what may never return.

        Args:
            what: is waited for.
            seconds: that it may take; None: as the guard's patience.
            late: why all end where it takes longer; "": as the guard's account.
        """
        with self._lock:
            number = next(self._numbers)
            self._asked[number] = what, self.clock(), seconds, late
        try:
            yield
        finally:
            with self._lock:
                del self._asked[number]

    def decide(self, message: str, code: int) -> None:
        """End within seconds, whatever this process is held up by; the first decision holds.

        Args:
            message: why, unless another rank says it.
            code: exit code.
        """
        if self._decided is None:
            self._decided = message, code, self.clock()

    def claim(self, message: str, code: int) -> None:
        """Decide on the end, as the one thread that brings it about.

        No other thread returns from here: what it would say is only what followed.

        Args:
            message: why this process ends.
            code: its exit code.
        """
        if not self._claimed.acquire(blocking=False):
            threading.Event().wait()
        self._decided = message, code, self.clock()

    def stand_down(self) -> None:
        """End nothing any more, for all went well; where the end is claimed, wait for it."""
        if not self._claimed.acquire(blocking=False):
            threading.Event().wait()
        self._down = True
        self._claimed.release()

    def revise(self, message: str) -> None:
        """Give another reason for the end that was claimed."""
        _, code, begun = self._decided or ("", 1, self.clock())
        self._decided = message, code, begun

    def say(self) -> None:
        """Say why this process ends, unless it is known to have been said."""
        if not _silent.is_set():
            say(self._decided[0] if self._decided else "this rank ends for no known reason")

    def end(self) -> NoReturn:
        """End as decided, and say why if nobody has."""
        _quickly(self.say)
        end_process(self._decided[1] if self._decided else 1)

    def _watch(self) -> None:
        while not self._down:
            time.sleep(_TICK)
            now = time.monotonic()
            gap, self._ticked = now - self._ticked, now
            self._ran += min(gap, _PAUSE)
            self.stopped = max(self.stopped, gap if gap > _PAUSE else 0.0)
            if self._decided is None:
                self._look()
            elif self._ran - self._decided[2] > _ENDING:
                self.end()

    def _look(self) -> None:
        with self._lock:
            asked = list(self._asked.values())
        for what, begun, seconds, late in asked if not self._down else ():
            waited = self._ran - begun
            if waited > (self._patience() if seconds is None else seconds):
                self.claim(late or self._account(what, waited), 1)
                _quickly(self.say)
                _quickly(self._spread)
                self.end()


def say(message: str) -> None:
    """Print why this process ends."""
    if not is_command():
        message = message.replace(f"; {on_disk()}", "")
    _silent.set()
    with suppress(OSError, ValueError):  # nobody reads it any more
        sys.stdout.flush()
    with suppress(OSError, ValueError):
        print(f"foldcp: {message}", file=sys.stderr, flush=True)


def hear() -> None:
    """Note that another rank has said why all end: this one need not."""
    _silent.set()


def end_process(code: int) -> NoReturn:
    """End this process and those that it started, without waiting for anything.

    Args:
        code: exit code.
    """
    release_soon()
    _quickly(_flush)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def _quickly(work: Callable[[], None]) -> None:
    """Do something that may be held up, and do not wait for it for long."""
    thread = threading.Thread(target=work, daemon=True)
    with suppress(RuntimeError):  # the interpreter is at its end
        thread.start()
        thread.join(_SOON)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
