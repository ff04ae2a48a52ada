"""End a run within seconds of SIGTERM, SIGHUP or Ctrl-C, even inside a collective.

Lightning replaces the default actions by Python handlers, which only run once the main thread is
back in the interpreter. A thread that reads Python's wakeup socket hears of a signal at once.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn, Protocol

from foldcp.errors import on_disk
from foldcp.runtime.liveness.guard import Guard

if TYPE_CHECKING:
    from foldcp.runtime.liveness.peers import Peers

_ENDING = (signal.SIGTERM, signal.SIGHUP)  # SIGHUP: the terminal is gone
_OVER = b"\0"  # no signal: the session is over
_GRACE = 3.0  # seconds in which the main thread may end by itself after Ctrl-C

_HAS_SENDERS = hasattr(socket, "SO_PASSCRED")  # Linux
_SENDER = struct.Struct("3i")  # pid, uid, gid of who wrote


class Ends(Protocol):
    """Ends all ranks of a run: a session.

    Attributes:
        interrupted: set after SIGINT: later failures are consequences of it.
    """

    guard: Guard
    interrupted: threading.Event
    peers: Peers | None

    def fail(self, message: str, code: int = 1) -> NoReturn:
        """End every rank with a message and an exit code.

        Args:
            message: why the run ends.
            code: exit code.
        """


# Signals end a session of this process. Process-wide as what it decides on: Python calls `_forget`
# in every forked process from now on, and knows no session.
_on = threading.Event()


def end_on_signals(session: Ends) -> Callable[[], None]:
    """Make SIGTERM, SIGHUP and SIGINT end all ranks of a session, unless they are ignored.

    Does nothing outside the main thread.

    Args:
        session: of this process.

    Returns:
        Undoes it.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    reader, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    if _HAS_SENDERS:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    writer.setblocking(False)
    # Only signals with a Python handler reach the socket; this one need not do more.
    before = {number: signal.getsignal(number) for number in _ENDING}
    for number, action in before.items():
        if action != signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    woken = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    _on.set()
    threading.Thread(target=_wait, args=(session, reader), daemon=True).start()

    def undo() -> None:
        signal.set_wakeup_fd(woken)
        for number, action in before.items():
            signal.signal(number, signal.SIG_DFL if action is None else action)
        _on.clear()
        writer.send(_OVER)

    return undo


def _forget() -> None:
    """Give a forked worker the default actions."""
    if not _on.is_set():
        return
    signal.set_wakeup_fd(-1)
    for number in _ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget)


def _receive(reader: socket.socket) -> int:
    """Number of the next signal of this process.

    A forked worker shares the socket until `_forget` has run in it: a pool may end it before that.
    """
    while True:
        data, senders, *_ = reader.recvmsg(1, socket.CMSG_SPACE(_SENDER.size))
        pids = [_SENDER.unpack(content[: _SENDER.size])[0] for _, _, content in senders]
        if data and all(pid == os.getpid() for pid in pids):
            return data[0]


def _wait(session: Ends, reader: socket.socket) -> None:
    while True:
        number = _receive(reader)
        if number in _ENDING:
            why = f"ended by {signal.Signals(number).name}; {on_disk()}"
            session.guard.decide(why, 128 + number)  # looking for a lost rank may be held up
            session.fail(_lost(session) or why, 128 + number)
        if number == signal.SIGINT:
            session.interrupted.set()
            time.sleep(_GRACE)
            session.fail(f"interrupted; {on_disk()}", 128 + signal.SIGINT)
        if number == _OVER[0]:
            return


def _lost(session: Ends) -> str | None:
    """A launcher ends all ranks when one of them was killed: that one is the reason."""
    try:
        lost = session.peers.gone() if session.peers is not None else None
    except RuntimeError:
        return None
    return None if lost is None else f"{lost}, all ranks end; {on_disk()}"
