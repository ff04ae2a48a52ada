"""Exchange state of this process: whether it is waiting for peers, and which exchanges failed."""

from __future__ import annotations

from typing import Any

# True while this rank waits for others: when all the others do, it is the one they wait for.
waiting = False
# Exchanges that an error left unfinished: the transport may still write into their memory.
broken: list[Any] = []


def forget_broken() -> None:
    """Let go of what failed exchanges held; their transport must be closed."""
    global waiting
    broken.clear()
    waiting = False
