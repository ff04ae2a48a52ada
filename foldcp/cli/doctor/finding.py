"""One line of `foldcp doctor`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One fact about this machine.

    Args:
        name: of what it is about.
        text: what there is.
        remedy: of a problem, "" where there is none.
        fatal: something that was asked for cannot run.
    """

    name: str
    text: str
    remedy: str = ""
    fatal: bool = False
