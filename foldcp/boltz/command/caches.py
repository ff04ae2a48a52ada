"""A folder for the code that numba compiles for Boltz, where its own choices cannot be written."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import MutableMapping
from pathlib import Path


def choose_numba_folder(environ: MutableMapping[str, str], package: Path) -> None:
    """Set NUMBA_CACHE_DIR if neither the installation nor the home can be written.

    Numba raises otherwise as soon as Boltz is imported: "no locator available".

    Args:
        environ: usually `os.environ`.
        package: folder of the installed `boltz`.
    """
    if environ.get("NUMBA_CACHE_DIR"):
        return
    home = environ.get("HOME") or os.path.expanduser("~")
    cache = Path(environ.get("XDG_CACHE_HOME") or Path(home) / ".cache")
    installed = package / "data" / "feature" / "__pycache__"
    if not _writable(installed) and not _writable(cache / "numba"):
        environ["NUMBA_CACHE_DIR"] = str(_private(Path(tempfile.gettempdir())))


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _private(folder: Path) -> Path:
    """A folder of this user alone: numba's files are pickles, which run code when loaded."""
    wanted = folder / f"foldcp_numba_{os.getuid()}"
    try:
        wanted.mkdir(mode=0o700, exist_ok=True)
        found = wanted.lstat()
    except OSError:
        return Path(tempfile.mkdtemp(prefix="foldcp_numba_"))
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if mine and not found.st_mode & 0o077:
        return wanted
    return Path(tempfile.mkdtemp(prefix="foldcp_numba_"))
