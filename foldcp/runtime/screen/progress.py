"""Measure the progress of one input: its stages as shares of the whole, and the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

_BLOCKS = 8 / 68  # blocks of the confidence module for one of the trunk


def trunk_work(n: int) -> float:
    """Work of one pass of the trunk in TFLOP, modelled.

    Fitted to the FLOPs of Boltz-2 at N = 768, 3605 and 10,000: triangle ops cubic, the rest square.

    Args:
        n: tokens.
    """
    return 1.25e-7 * n**3 + 3.2e-5 * n**2


def sampling_work(n: int) -> float:
    """Model the work of one sampling step of one sample, in TFLOP.

    Args:
        n: tokens.
    """
    return 1.45e-3 * n


class Progress:
    """The way of one input through its stages ("recycle 1/4", "diffusion", "confidence").

    Args:
        name: of the input.
        tokens: N.
        passes: of the trunk.
        steps: of the sampler.
        samples: structures.
        rated: of these get a confidence.
        hear: called with every report.
        pace: seconds per unit of work of each kind of stage, of earlier inputs; `end` updates it.

    Attributes:
        stage, done, total: under way. fresh: it has just begun.
    """

    def __init__(
        self, name: str, tokens: int, passes: int = 1, steps: int = 0, samples: int = 0,
        rated: int = 0, hear: Callable[[Progress], None] = lambda _: None,
        pace: dict[str, float] | None = None,
    ) -> None:  # fmt: skip
        self.name, self.tokens = name, tokens
        self._hear, self._pace = hear, {} if pace is None else pace
        trunk = trunk_work(tokens)
        self._work = {
            "recycle": passes * trunk,
            "diffusion": steps * samples * sampling_work(tokens),
            "confidence": rated * _BLOCKS * trunk,
        }
        self._parts = {"recycle": passes, "diffusion": 1, "confidence": 1}
        self._finished = dict.fromkeys(self._work, 0.0)  # share of each kind
        self._seconds = dict.fromkeys(self._work, 0.0)
        self._since = time.monotonic()
        self.stage, self.done, self.total, self.fresh = "", 0, 1, False
        self._shown = 0.0

    def end(self) -> None:
        """Remember how long the work took, for the inputs that follow."""
        for name, seconds in self._seconds.items():
            if self._finished[name] > 0 and self._work[name] > 0:
                self._pace[name] = seconds / (self._finished[name] * self._work[name])

    def update(self, stage: str, done: int, total: int) -> None:
        """Report that `done` of `total` units of a stage are finished.

        Args:
            stage: its name.
            done: units that are finished.
            total: units of the stage.
        """
        kind, now = _kind(self.stage), time.monotonic()
        if kind in self._seconds:
            self._seconds[kind] += now - self._since
        self._since, self.fresh = now, stage != self.stage
        self.stage, self.done, self.total = stage, done, total
        kind = _kind(stage)
        if kind in self._work:
            before = (self._number() - 1) / self._parts[kind]
            self._finished[kind] = before + done / max(1, total) / self._parts[kind]
        self._hear(self)

    def _number(self) -> int:
        """Number the stage among those of its kind, from 1."""
        number = self.stage.partition(" ")[2].partition("/")[0]
        return int(number) if number.isdigit() else 1

    @property
    def fraction(self) -> float:
        """Finished share of the whole, between 0 and 1; it never falls."""
        left, done = self._left(self._rates()), sum(self._seconds.values())
        if self._finished["recycle"] == 0 and not any(self._finished.values()):
            return 0.0
        self._shown = max(self._shown, done / max(done + left, 1e-9))
        return min(1.0, self._shown)

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds to the end; None while nothing is known."""
        rates = self._rates()
        return self._left(rates) if rates else None

    def _rates(self) -> dict[str, float]:
        """Seconds per unit of work of each kind: this input's, else that of earlier ones."""
        own = {
            k: self._seconds[k] / (self._finished[k] * self._work[k])
            for k in self._work
            if self._finished[k] > 0 and self._work[k] > 0
        }
        return {**self._pace, **own}

    def _left(self, rates: Mapping[str, float]) -> float:
        known = [rates[k] for k in rates]
        usual = sum(known) / len(known) if known else 1.0
        return sum(
            (1 - self._finished[k]) * work * rates.get(k, usual) for k, work in self._work.items()
        )


def _kind(stage: str) -> str:
    return stage.partition(" ")[0]


def clock(seconds: float) -> str:
    """Format a length of time as 0:07, 1:20 or 2:03:00."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
