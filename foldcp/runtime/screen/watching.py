"""Show a run's progress on rank 0: the input in progress, its stage, the time left.

Every rank has one of these: its stages are also what other ranks say of it when it is missing, and
the root of each data-parallel group counts what its group has finished.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from foldcp.runtime.screen.console import Console
from foldcp.runtime.screen.progress import Progress, clock
from foldcp.runtime.screen.stages import Stages
from foldcp.runtime.screen.summary import shortened

if TYPE_CHECKING:
    from foldcp.runtime.session import Session

Item = TypeVar("Item")

_WORDS = {"recycle": "trunk", "diffusion": "sampling"}  # where a user's word is another one
_UNTOLD = ("input", "distogram", "conditioning")  # stages that are over at once


class Watching:
    """The view of one rank.

    Args:
        session: the ranks.
        console: where it is shown; None on other ranks than 0.

    Attributes:
        pace: seconds per unit of work of each kind of stage, of the inputs so far.
        stages: time and memory of this rank's stages.
    """

    def __init__(self, session: Session, console: Console | None) -> None:
        self._session, self._console = session, console
        self._total, self._finished = 0, 0
        self.pace: dict[str, float] = {}
        self.stages = Stages()

    def expect(self, inputs: int) -> None:
        """Note how many inputs all groups are to fold."""
        self._total, self._finished = inputs, 0

    def stage(self, text: str) -> None:
        """Show what is being done where no share of it is known."""
        self._session.at(text)
        self.stages.begin(text.partition(":")[0])
        if self._console is not None:
            self._console.show(text, None, "", fresh=True)

    def each(
        self, items: Iterable[Item], *_: Any, total: int | None = None, **__: Any
    ) -> Iterator[Item]:
        """Go through inputs that are read, in the way of `tqdm.tqdm`, and show how far.

        Args:
            items: what to go through.
            total: their number; None asks `items`.
        """
        count = len(items) if total is None else total  # type: ignore[arg-type]
        for i, item in enumerate(items):
            if self._console is not None and count > 1:
                what = f"reading input {i + 1} of {count}"
                self._console.show(what, i / count, "", fresh=False)
            yield item

    def begin(self, name: str, tokens: int, **work: int) -> Progress:
        """Begin to show the way of an input through its stages.

        Args:
            name: of the input.
            tokens: N.
            work: further arguments of `Progress`.
        """
        return Progress(name, tokens, **work, hear=self._hear, pace=self.pace)

    def _hear(self, progress: Progress) -> None:
        """Take a report of the input under way."""
        if progress.fresh:
            self._session.at(f"{progress.stage} of {progress.name}")
        kind, _, number = progress.stage.partition(" ")
        if progress.fresh:
            self.stages.begin(_WORDS.get(kind, kind))
        if self._console is None:
            return
        if kind in _UNTOLD:
            return
        what = " ".join(part for part in (_WORDS.get(kind, kind), number) if part)
        if progress.total > 1 and not number:
            what = f"{what} {progress.done}/{progress.total}"
        left = progress.seconds_left
        time_left = "" if left is None or progress.done == 0 else f"{clock(left)} left"
        self._console.show(
            f"{self._where(progress.name)}: {what}", progress.fraction, time_left, progress.fresh
        )

    def finished(self, writes: bool) -> None:
        """Note that the input under way is done with, folded or not.

        Args:
            writes: this rank is its group's root.
        """
        self._finished += 1
        if writes and not self._session.is_root and self._session.store is not None:
            with suppress(RuntimeError):  # the watch over the ranks notices
                self._session.store.add(f"finished/{self._session.group}", 1)
        if self._console is not None:
            self._console.again()

    def wait(self) -> None:
        """Show how far the other groups are; called again and again."""
        if self._console is not None and self._session.groups > 1:
            done = self._count()
            what = f"{done} of {self._total} inputs done, other groups are at work"
            self._console.show(what, done / max(1, self._total), "", fresh=False)

    def _count(self) -> int:
        """Inputs that all groups are done with."""
        others = 0
        if self._session.groups > 1 and self._session.store is not None:
            with suppress(RuntimeError):
                others = sum(
                    self._session.store.add(f"finished/{group}", 0)
                    for group in range(1, self._session.groups)
                )
        return self._finished + others

    def _where(self, name: str) -> str:
        if self._total <= 1:
            return name
        done = self._count()
        if self._session.groups > 1:
            return f"{done} of {self._total} inputs done, {name}"
        return f"input {min(done + 1, self._total)} of {self._total}, {name}"

    def conclude(self, lines: list[str], failed: Mapping[str, str]) -> None:
        """Print the summary of the run; of a long one the first lines, and the log gets all.

        Args:
            lines: its lines.
            failed: inputs and why, which the end of the run says on the screen.
        """
        if self._console is None:
            return
        self._console.clear()
        shown = shortened(lines)
        print("\n".join(f"foldcp: {line}" for line in shown), flush=True)
        for line in lines[len(shown) - 2 : -1] if len(shown) < len(lines) else ():
            self._console.log.write(line)
        for name, why in failed.items():
            self._console.log.write(f"failed: {name}: {why}")

    def clear(self) -> None:
        """Take away what is shown."""
        if self._console is not None:
            self._console.clear()


class Bar:
    """Stands for a `tqdm` bar of Boltz's client of the MSA server: its states are stages.

    Args:
        watching: where they are shown.
        total: seconds that the server is expected to take.
    """

    def __init__(self, watching: Watching, *_: Any, total: float | None = None, **__: Any) -> None:
        self._watching, self._said = watching, ""
        self.total, self.n = total, 0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._watching.clear()

    def set_description(self, text: str = "", *_: Any, **__: Any) -> None:
        """Show what the server says."""
        if text != self._said:
            self._said = text
            self._watching.stage(f"MSA server: {text.lower()}")

    def update(self, n: int = 1) -> None:
        """Count seconds."""
        self.n += n
