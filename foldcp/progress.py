"""Progress of a long run on the root rank: trunk blocks and sampling steps, with time left."""

from __future__ import annotations

from types import TracebackType

from tqdm import tqdm


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
        if not self._enabled:
            return
        if stage != self._stage:
            self._close()
            self._stage = stage
            self._bar = tqdm(total=total, desc=f"{self._name} {stage}", mininterval=1.0)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
