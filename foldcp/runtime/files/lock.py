"""One run at a time in a folder: a lock that is a file, and holds on NFS too.

To make a link fails where its name is taken, on every file system and from every machine, and
`flock` does not reach as far. So each process writes a file of its own and links it to the lock's
name. A lock whose process is gone is replaced, never removed, by one who has locked that
replacement in the same way, under a name that only that lock gives: of many takers one finds it
still there. Whether a process of another machine is gone, its heartbeat tells: the time of the
lock's file, by the clock of the file server.
"""

from __future__ import annotations

import atexit
import errno
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from foldcp.errors import UserError
from foldcp.runtime.files.holder import Holder
from foldcp.runtime.files.seal import Seal, Seen, key_of, look

NAME = ".foldcp_lock"
RENEW = 10.0  # seconds between two signs of life of a lock's holder
STALE = 300.0  # seconds without one after which a holder of another machine is given up
_LOOK = 0.5  # seconds between two looks at a lock that another one holds
_QUIET = 3.0  # seconds of waiting without a word
_RELEASE = 2.0  # seconds in which a process that ends gives its locks back
_TURNS = 1000  # of taking a lock that keeps changing
_MOMENT = 0.02  # seconds that taking a lock over takes

_held: list[Lock] = []


class Held(UserError):
    """Another process holds the lock.

    Args:
        who: holds it, for a message.
    """

    def __init__(self, who: str) -> None:
        super().__init__(f"held by {who}")
        self.who = who


class Lock:
    """The lock of a folder, taken by `take`.

    Args:
        folder: there, and to be written.
        on_loss: called from another thread when another run has taken it, with what to say.
    """

    def __init__(self, folder: Path, on_loss: Callable[[str], None] | None = None) -> None:
        self.path = folder.resolve() / NAME
        self._on_loss = on_loss
        self._data = Holder.own().written()
        self.seal = Seal(str(self.path), key_of(self._data))
        self._pid = os.getpid()
        self._over, self._turn = threading.Event(), threading.Lock()

    def take(self, wait: str = "") -> None:
        """Hold the lock until `release`, or the end of this process.

        Args:
            wait: for whoever holds it, and say so in these words; "": do not.

        Raises:
            Held: another run holds it.
            OSError: nothing can be written there.
        """
        since, announced = time.monotonic(), False
        while (seen := self._claim(self.path)) is not None:
            if not wait:
                raise Held(seen.who)
            if not announced and time.monotonic() - since > _QUIET:
                _say(f"{wait} ({seen.who})")
                announced = True
            time.sleep(_LOOK)
        _held.append(self)
        self._tidy()
        threading.Thread(target=self._renew, daemon=True).start()

    def release(self) -> None:
        """Give the lock back; nothing happens in a forked process, or if it was lost."""
        if os.getpid() != self._pid:
            return
        self._over.set()
        with self._turn:
            if self in _held:
                _held.remove(self)
                self._drop(self.path)

    def _tidy(self) -> None:
        """Remove what processes left that were killed while they took the lock."""
        with suppress(OSError):
            now = self.path.stat().st_mtime
            for path in self.path.parent.glob(f"{NAME}.*"):
                if now - path.lstat().st_mtime > STALE:
                    path.unlink()

    def _claim(self, path: Path) -> Seen | None:
        """Put this process's record under a name; returns who else has it, None on success."""
        for _ in range(_TURNS):
            if self._put(path):
                return None
            seen = look(path)
            lives = None if seen is None else self._lives(path, seen)
            if seen is None or lives is None:  # released, or another's by now
                continue
            if lives:
                return seen
            taking = path.with_name(f"{NAME}.{seen.key}")
            if self._claim(taking) is not None:
                time.sleep(_MOMENT)
                continue
            try:
                now = look(path)
                if now is not None and (now.key, now.renewed) == (seen.key, seen.renewed):
                    os.replace(self._write(), path)
                    return None
            finally:
                self._drop(taking)
        raise UserError(f"{path} changes all the time: remove it and start again")

    def _put(self, path: Path) -> bool:
        own = self._write()
        try:
            os.link(own, path)
            return True
        except OSError as error:
            if os.stat(own).st_nlink == 2:  # the server's first answer was lost on the way
                return True
            if error.errno == errno.EEXIST:
                return False
        finally:
            own.unlink(missing_ok=True)
        return self._create(path)

    def _create(self, path: Path) -> bool:
        """Create the lock where the file system has no links, see `_put`; at first it is empty."""
        try:
            file = path.open("xb")
        except FileExistsError:
            return False
        try:
            with file:
                file.write(self._data)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return True

    def _write(self) -> Path:
        """A file of this process alone."""
        path = self.path.with_name(f"{NAME}.{secrets.token_hex(8)}.new")
        try:
            with path.open("xb") as file:
                file.write(self._data)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return path

    def _drop(self, path: Path) -> None:
        with suppress(OSError, UserError):
            seen = look(path)
            if seen is not None and seen.key == self.seal.key:
                path.unlink()

    def _lives(self, path: Path, seen: Seen) -> bool | None:
        """Tell whether the holder of a lock still runs; None when the lock changed meanwhile."""
        lives = seen.holder.lives() if seen.holder is not None else None
        if lives is not None:
            return lives
        own, since, announced = self._write(), time.monotonic(), False
        try:
            while True:
                os.utime(own)  # by the file server's clock, as its renewal was
                waited = time.monotonic() - since
                if max(waited, os.stat(own).st_mtime - seen.renewed) > STALE:
                    return False
                if not announced and waited > _QUIET:
                    _say(
                        f"{self.path.parent} was locked by {seen.who}, which cannot be seen from "
                        f"here: waiting for a sign of life, {STALE:.0f} s at most (remove "
                        f"{self.path} if that run is gone)"
                    )
                    announced = True
                time.sleep(_LOOK)
                now = look(path)
                if now is None or now.key != seen.key:
                    return None
                if now.renewed != seen.renewed:
                    return True
        finally:
            own.unlink(missing_ok=True)

    def _renew(self) -> None:
        """Give signs of life, and notice when the lock was taken over."""
        while not self._over.wait(RENEW):
            seen = None
            with self._turn, suppress(OSError, UserError):
                seen = None if self._over.is_set() else self._sign_of_life()
            if seen is None:
                continue
            if self._on_loss is not None:
                self._on_loss(
                    f"the lock of {self.path.parent} was taken by another run ({seen.who}), "
                    f"because this one gave no sign of life for {STALE:.0f} s: start it again"
                )
            return

    def _sign_of_life(self) -> Seen | None:
        """Renew the lock; returns the one that is there in its place, None if it is still held."""
        seen = look(self.path)
        if seen is None:
            self._put(self.path)  # somebody tidied up
        elif seen.key == self.seal.key:
            os.utime(self.path)
        else:
            return seen
        return None


def release_all() -> None:
    """Give back every lock of this process."""
    for lock in list(_held):
        lock.release()


def release_soon() -> None:
    """Give back every lock of a process that ends, whose file server may not answer."""
    if _held:
        worker = threading.Thread(target=release_all, daemon=True)
        worker.start()
        worker.join(_RELEASE)


def _say(message: str) -> None:
    print(f"foldcp: {message}", file=sys.stderr, flush=True)


atexit.register(release_all)
