"""Record when math and transfers ran on one rank, for `foldcp bench rings`; free otherwise."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from foldcp.fabric.transport.engine_transport import tag


@dataclass(frozen=True)
class Interval:
    """Something that took time on one rank.

    Args:
        kind: "math" or "transfer".
        label: of the exchange.
        step: of the exchange.
        start: ns of the steady clock; of a transfer, after packing.
        end: ns of the steady clock; of a transfer, when the last byte has moved.
    """

    kind: str
    label: str
    step: int
    start: int
    end: int


@dataclass
class Timeline:
    """The intervals of one rank while `record` is open.

    Args:
        device: of the math.
    """

    device: torch.device
    intervals: list[Interval] = field(default_factory=list)
    _labels: set[str] = field(default_factory=set)
    _marks: list[tuple[str, int, Any, Any]] = field(default_factory=list)

    @contextmanager
    def math(self, label: str, step: int) -> Iterator[None]:
        """Time the math of a step that runs inside.

        Args:
            label: of the exchange.
            step: of the exchange.
        """
        self._labels.add(label)
        start = self._now()
        try:
            yield
        finally:
            self._marks.append((label, step, start, self._now()))

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _finish(self, origin: tuple[Any, int], rows: Sequence[tuple[int, ...]]) -> None:
        def ns(mark: Any) -> int:
            if self.device.type != "cuda":
                return int(mark)
            mark.synchronize()
            return origin[1] + int(origin[0].elapsed_time(mark) * 1e6)

        self.intervals += [Interval("math", w, t, ns(a), ns(b)) for w, t, a, b in self._marks]
        names = {tag(label, 0) >> 16: label for label in self._labels}
        for number, _start, packed, moved, _end in rows:
            label = names.get(number >> 16)
            if label is not None:
                step = number & 0xFFFF
                self.intervals.append(Interval("transfer", label, step, packed, moved))


class Timed(Protocol):
    """Name what recording asks of a mesh."""

    link: Any
    timeline: Timeline | None

    @property
    def device(self) -> torch.device:
        """Device of the math."""


@contextmanager
def record(mesh: Timed) -> Iterator[Timeline]:
    """Record the exchanges of this rank.

    Args:
        mesh: with a transport of the compiled engine; others give math only.

    Yields:
        The timeline; its intervals are there once the context is left.
    """
    line = Timeline(mesh.device)
    trace = getattr(mesh.link, "trace", None)
    if trace is not None:
        trace(True)
    mark = line._now()
    if mesh.device.type == "cuda":
        mark.synchronize()
    origin = mark, time.perf_counter_ns()
    mesh.timeline = line
    try:
        yield line
    finally:
        mesh.timeline = None
        rows = mesh.link.take_trace() if trace is not None else []
        if trace is not None:
            trace(False)
        line._finish(origin, rows)


def math(mesh: Timed, label: str, step: int) -> AbstractContextManager[None]:
    """Mark the math of a step of an exchange, where anybody records.

    Args:
        mesh: whose exchange it is.
        label: of the exchange.
        step: of the exchange.
    """
    return nullcontext() if mesh.timeline is None else mesh.timeline.math(label, step)


def hidden(intervals: Sequence[Interval]) -> float:
    """Return the fraction of transfer time during which this rank computed; 1 without transfers."""
    busy = sorted((i.start, i.end) for i in intervals if i.kind == "math")
    total = covered = 0
    for t in intervals:
        if t.kind != "transfer":
            continue
        total += t.end - t.start
        covered += sum(max(0, min(t.end, b) - max(t.start, a)) for a, b in busy)
    return covered / total if total else 1.0
