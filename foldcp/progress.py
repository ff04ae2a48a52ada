"""Progress of a long run on the root rank: trunk blocks and sampling steps, with time left."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from tqdm import tqdm

_shown = True
_listeners: list[Callable[[str], None]] = []


def listen(listener: Callable[[str], None] | None) -> None:
    """Have a function called with every new stage ("recycle 1/4 of name"); None for no one."""
    _listeners[:] = [] if listener is None else [listener]


def show(on: bool) -> None:
    """Show bars in this process, or none whatever asks for them."""
    global _shown
    _shown = on


class Progress:
    """One bar per stage; a stage's bar appears with its first report.

    Args:
        name: of the sample. enabled: show anything at all.
    """

    def __init__(self, name: str, enabled: bool) -> None:
        self._name, self._enabled = name, enabled
        self._stage, self._bar = "", None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def update(self, stage: str, done: int, total: int) -> None:
        """Report that `done` of `total` units of a stage are finished."""
        if stage != self._stage:
            self._close()
            self._stage = stage
            for listener in _listeners:
                listener(f"{stage} of {self._name}")
            if self._enabled and _shown and total > 1:
                self._bar = tqdm(total=total, desc=f"{self._name} {stage}", mininterval=1.0)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
