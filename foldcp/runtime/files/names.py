"""Names and files that come from outside: what may be a file's name, and which files are read.

A name in a file or an input becomes part of a path only after `check`; files of a results folder
are regular files inside their folder, with links followed.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

Place = TypeVar("Place", str, Path)

LONGEST = 220  # bytes of an input's name: its files add a prefix and a suffix


class Unsafe(ValueError):
    """A name or a file that is not used; says why."""


def check(name: Any, what: str, longest: int = 250) -> str:
    """Refuse a name that cannot be the name of a file in a folder.

    Args:
        name: from a file or an input.
        what: it is, such as "a record's name".
        longest: bytes that it may have.

    Returns:
        The name.

    Raises:
        Unsafe: it is no text, empty, too long, a path, or holds control characters.
    """
    wrong = not isinstance(name, str) or name in ("", ".", "..")
    if wrong or any(c in "/\0" or ord(c) < 32 or ord(c) == 127 for c in name):
        raise Unsafe(f"{what} {name!r} is not used: it cannot be the name of a file")
    if len(os.fsencode(name)) > longest:
        raise Unsafe(f"{what} {name[:40]!r}... is not used: it has more than {longest} bytes")
    return str(name)


def inside(path: Path, folder: Path | None = None) -> Path:
    """Refuse a path that leads out of its folder, by its parts or by a link.

    Args:
        path: of a file or folder, which need not exist.
        folder: it must lie in; None: its parent.

    Returns:
        The path.

    Raises:
        Unsafe: it leads elsewhere.
    """
    within, found = (folder or path.parent).resolve(), path.resolve()
    if ".." in path.parts[-1:] or within not in found.parents:
        raise Unsafe(f"{path} is not used: it leads to {found}, outside of {within}")
    return path


def regular(path: Place) -> Place:
    """Refuse what is there but no regular file, such as a folder, a device or a pipe.

    Args:
        path: of a file, which need not exist.

    Returns:
        The path.

    Raises:
        Unsafe: it is another thing.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return path  # opening it says why
    if not stat.S_ISREG(mode):
        raise Unsafe(f"{path} is not used: it is {kind(mode)}, not a regular file")
    return path


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; never waits for somebody to write into a pipe.

    Raises:
        Unsafe: it is another thing.
        OSError: it cannot be opened.
    """
    number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(number).st_mode
    if not stat.S_ISREG(mode):
        os.close(number)
        raise Unsafe(f"{path} is not used: it is {kind(mode)}, not a regular file")
    return os.fdopen(number, "rb")


def kind(mode: int) -> str:
    """Name the kind of a file that is not regular, by its mode."""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")
