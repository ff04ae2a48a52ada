"""The holder of a lock: the content of its file, and whether its process still runs."""

from __future__ import annotations

import getpass
import json
import os
import secrets
import socket
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from foldcp.fabric.machine import machine

_LONGEST = 64  # characters of a name that a message shows


@dataclass(frozen=True)
class Holder:
    """A process that holds a lock.

    Args:
        host: name of its machine, for messages.
        machine: boot and process table, so that two with the same one see each other; "": unknown.
        pid: number of the process there.
        started: when it began, which distinguishes it from a later one.
        user: who runs it.
        since: seconds since 1970 by its own clock.
        token: of this lock alone.
    """

    host: str
    machine: str
    pid: int
    started: str
    user: str
    since: float
    token: str

    @classmethod
    def own(cls) -> Holder:
        """Describe this process, with a new token."""
        pid = os.getpid()
        started = (_stat(pid) or ("", ""))[1]
        token = secrets.token_hex(16)
        return cls(socket.gethostname(), _machine(), pid, started, _user(), time.time(), token)

    @classmethod
    def read(cls, data: bytes) -> Holder | None:
        """Read the content that `written` wrote; None for anything else."""
        try:
            content = json.loads(data)
            values = {field.name: content[field.name] for field in fields(cls)}
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        kinds: dict[str, Any] = {"pid": int, "since": (int, float)}
        good = all(isinstance(v, kinds.get(k, str)) for k, v in values.items())
        return cls(**values) if good and 0 < values["pid"] < 2**31 else None

    def written(self) -> bytes:
        """Return the content of a lock's file."""
        return (json.dumps(asdict(self)) + "\n").encode()

    def lives(self) -> bool | None:
        """Tell whether its process still runs; None if that cannot be seen from here."""
        if not self.machine or not self.started or self.machine != _machine():
            return None
        found = _stat(self.pid)
        if found is not None:
            return found[1] == self.started and found[0] not in "ZX"
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return None  # it is there, but /proc hides other users' processes (hidepid)

    def __str__(self) -> str:
        try:
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        except (ValueError, OverflowError, OSError):
            since = "an unknown time"
        where = f"process {self.pid} on {_plain(self.host)}"
        return f"user {_plain(self.user)}, {where}, since {since}"


def _machine() -> str:
    try:
        return "/".join(map(str, machine()))
    except OSError:  # no Linux, or a sandbox without it
        return ""


def _stat(pid: int) -> tuple[str, str] | None:
    """(state letter, start time) of a process; None when it is not seen."""
    try:
        found = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return found[0], found[19]
    except (OSError, IndexError):
        return None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no name for this number
        return str(os.getuid())


def _plain(text: str) -> str:
    """A name for a message: the file that it stands in may be anybody's."""
    return "".join(c for c in text[:_LONGEST] if c.isprintable()) or "?"
