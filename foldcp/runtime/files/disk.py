"""Say what to do where the system refuses to write: a full disk, no files left, read-only."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (*_FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


def refused(error: BaseException) -> str | None:
    """Word the message about an error of the file system; None for any other error.

    Args:
        error: of a call that writes; the name of its file decides on the advice.
    """
    if not isinstance(error, OSError):
        return None
    if isinstance(error, FileNotFoundError) and "temporary directory" in str(error):
        return "no folder for temporary files can be written: free the disk or set TMPDIR to one"
    if error.errno not in _REFUSED:
        return None
    path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else None
    what = f"{path} cannot be written" if path else "a file cannot be written"
    return f"{what} ({reason(error)}): {_remedy(error, path)}"


def reason(error: OSError) -> str:
    """Return the system's reason, and whether files rather than bytes have run out."""
    text = error.strerror or str(error)
    if error.errno not in _FULL or not isinstance(error.filename, (str, bytes)):
        return text
    folder = Path(os.fsdecode(error.filename))
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        left = os.statvfs(folder)
    except OSError:
        return text
    return f"{text}: no further file fits on it" if left.f_files and not left.f_favail else text


def _remedy(error: OSError, path: Path | None) -> str:
    temporary = Path(tempfile.tempdir or "/tmp")
    if path is not None and temporary in path.parents and path.name.startswith(("foldcp_", "tmp")):
        other = "name another folder with TMPDIR"
    else:
        other = "pass another --out_dir"
    if error.errno in _FULL:
        return f"free the disk or {other}"
    return f"change the permissions or {other}" if error.errno != errno.EIO else other
