"""The file of a lock as others find it, and the copy of its key that every rank of a run has."""

from __future__ import annotations

import errno
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from foldcp.errors import UserError
from foldcp.runtime.files.holder import Holder
from foldcp.runtime.files.names import Unsafe, open_regular

_MOST = 4096  # bytes of a lock's file that are read


class Lost(Unsafe):
    """Another run has taken the folder, or nobody holds it any more: nothing is written there."""


@dataclass(frozen=True)
class Seal:
    """The file of a run's lock, as every rank knows it.

    Args:
        path: of its file.
        key: what that file says, while it is this run's.
    """

    path: str
    key: str

    @property
    def tag(self) -> str:
        """Stands in names of this run's unfinished files."""
        return self.key[:8]

    def check(self) -> None:
        """Refuse to go on in a folder that is not this run's any more.

        Raises:
            Lost: it is not.
        """
        seen = look(Path(self.path))
        if seen is None or seen.key != self.key:
            who = f"another run has it ({seen.who})" if seen is not None else "its lock is gone"
            raise Lost(f"nothing more is written to {Path(self.path).parent}: {who}")


@dataclass(frozen=True)
class Seen:
    """A lock's file: what tells it from another, who made it, when it was renewed."""

    key: str
    holder: Holder | None
    owner: int
    renewed: float

    @property
    def who(self) -> str:
        """Holder of the lock, for messages."""
        return str(self.holder) if self.holder is not None else f"user number {self.owner}"


def key_of(data: bytes) -> str:
    """Return a key that tells the content of a lock's file from that of any other."""
    return hashlib.sha256(data).hexdigest()[:32]


def look(path: Path) -> Seen | None:
    """Look at a lock as it is now; None if nobody holds it.

    Raises:
        UserError: something else has its name.
    """
    data, holder = b"", None
    try:
        if path.is_symlink():
            raise Unsafe(f"{path} is not used: it is a link")
        try:
            with open_regular(path) as file:  # NFS looks anew at what is opened
                status, data = os.fstat(file.fileno()), file.read(_MOST)
        except PermissionError:
            status = os.stat(path)
        holder = Holder.read(data)
    except Unsafe as error:
        raise UserError(f"{error}: remove it") from error
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return None
        raise
    # One that says nothing is being written, was cut short, or is not for us to read.
    key = key_of(data) if holder is not None else f"{status.st_ino:x}"
    return Seen(key, holder, status.st_uid, status.st_mtime)
