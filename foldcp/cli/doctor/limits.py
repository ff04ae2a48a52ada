"""Ask about limits of the system that a run of several ranks meets."""

from __future__ import annotations

import os
import resource

from foldcp.cli.doctor.finding import Finding

_SHARED = 1 << 30  # bytes of /dev/shm that NCCL's guide asks of a container
_FILES = 1024  # the usual limit; a rank opens some for each other rank and each worker


def shared_memory(gpus: int, size: int | None) -> Finding:
    """Judge the size of /dev/shm.

    Args:
        gpus: how many there are.
        size: bytes, None: there is none.

    Source: NCCL user guide, "Troubleshooting", Docker.
    """
    if size is None:
        remedy = "mount a tmpfs at /dev/shm" if gpus > 1 else ""
        return Finding("/dev/shm", "none", remedy)
    text = f"{size / 2**30:.3g} GiB"
    if gpus > 1 and size < _SHARED:
        remedy = "NCCL may fail: start the container with --shm-size=1g or --ipc=host"
        return Finding("/dev/shm", text, remedy)
    return Finding("/dev/shm", text)


def shared_memory_size(path: str = "/dev/shm") -> int | None:
    """Return the size of a file system, in bytes; None where there is none."""
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    return found.f_frsize * found.f_blocks


def open_files(limit: int) -> Finding:
    """Judge how many files a process may open.

    Args:
        limit: as `ulimit -n` says, or `resource.RLIM_INFINITY`.
    """
    text = _described(limit)
    if limit != resource.RLIM_INFINITY and limit < _FILES:
        return Finding("open files", text, "run `ulimit -n 4096` before")
    return Finding("open files", text)


def locked_memory(gpus: int, limit: int) -> Finding:
    """Judge how much memory a process may lock, which NCCL does over InfiniBand.

    Args:
        gpus: how many there are.
        limit: bytes, or `resource.RLIM_INFINITY`.

    Source: NCCL user guide, "Troubleshooting", Docker.
    """
    if limit == resource.RLIM_INFINITY:
        return Finding("lock memory", _described(limit))
    text = f"{limit / 2**20:.3g} MiB"
    if gpus > 1:
        remedy = (
            "over InfiniBand, run `ulimit -l unlimited` before, or start the container with "
            "--ulimit memlock=-1"
        )
        return Finding("lock memory", text, remedy)
    return Finding("lock memory", text)


def _described(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,}"
