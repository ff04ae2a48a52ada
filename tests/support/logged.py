"""Work in forked processes whose output is kept, and ports at which they can meet."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def fork(log: Path, work: Any, *arguments: Any, stdout: Path | None = None) -> int:
    """Do work in a forked process, which then ends with its exit code.

    Args:
        log: file that its output is added to.
        work: is called with the arguments; 1 is the exit code where it raises.
        arguments: of `work`.
        stdout: another file for standard output.

    Returns:
        Number of the process.
    """
    pid = os.fork()
    if pid:
        return pid
    for number, path in ((1, stdout or log), (2, log)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    code = 1
    try:
        work(*arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def free_ports() -> Iterator[int]:
    """Find ports that nobody listens at, below those that connections are given."""
    first = os.getpid() * 37
    for number in range(20000):
        port = 10000 + (first + number) % 20000
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
        yield port


def place(rank: int, world: int, port: int) -> dict[str, str]:
    """Make the variables that torchrun sets for a rank, none for one that is alone."""
    if world == 1:
        return {}
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    found |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in found.items()}
