"""Times of several callables on the same work, taken in turn in one process.

On a GPU: CUDA events around one call, the L2 cache overwritten before it, and the device kept busy
until the host has enqueued the call, so that launch overhead of the host is not in the time. How
long that takes is measured: a repeat that the host was too late for is taken again with a longer
head start, and where none suffices (the call waits for the device) the times say so. On a CPU: wall
clock. The order rotates from one repeat to the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

MIB = 1 << 20
WARM_UP, FEWEST, MOST = 2, 5, 50
# How long the device spins before the first event, in ms: what a few launches take, at first; at
# most what the thousand launches take that a stream holds before the host must wait.
HEAD_START, LONGEST = 0.3, 40.0
CYCLES = 2_000_000  # a ms, at the clock of the fastest chips: on slower ones it spins longer

Call = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Milliseconds: median, 20th and 80th percentile; repeats, and those with the host's time."""

    ms: float
    p20: float
    p80: float
    repeats: int
    late: int = 0

    def remark(self) -> str:
        """What a table must say beside the time; empty when it is the device's alone."""
        said = f"the host was late in {self.late} of {self.repeats} repeats: its time is in them"
        return said if self.late else ""


def percentile(values: list[float], q: float) -> float:
    """The q-th part (0 to 1) of the values, linear between neighbours."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    lo = int(at)
    hi = min(lo + 1, len(ordered) - 1)
    return ordered[lo] + (at - lo) * (ordered[hi] - ordered[lo])


class Clock:
    """Times single calls on one device.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        if self.cuda:
            size = torch.cuda.get_device_properties(device).L2_cache_size
            self.flush = torch.empty(2 * max(size, MIB), dtype=torch.int8, device=device)
        self._heads: WeakKeyDictionary[Call, float] = WeakKeyDictionary()

    def once(self, call: Call) -> tuple[float, bool]:
        """(milliseconds of one call, whether the host's launches are in them)."""
        if not self.cuda:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start), False
        head = self._heads.get(call, HEAD_START)
        ms, late, host = self._between_events(call, head)
        while late and head < LONGEST and host < LONGEST:
            head = min(max(4 * head, 2 * host), LONGEST)
            ms, late, host = self._between_events(call, head)
        self._heads[call] = head
        return ms, late

    def _between_events(self, call: Call, head: float) -> tuple[float, bool, float]:
        """(device ms, whether the device waited for the host, ms that the host took)."""
        self.flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(head * CYCLES))
        start = time.perf_counter()
        begin.record()
        call()
        end.record()
        host = 1e3 * (time.perf_counter() - start)
        late = begin.query()  # the spin was over before everything was enqueued
        end.synchronize()
        return begin.elapsed_time(end), late, host

    def peak_mib(self, call: Call) -> float | None:
        """What a call allocates beyond what is allocated before it, in MiB; None on a CPU."""
        if not self.cuda:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB

    def clear(self) -> None:
        """Give cached device memory back, after an out-of-memory error for example."""
        if self.cuda:
            torch.cuda.empty_cache()


def interleaved(clock: Clock, calls: dict[str, Call], budget_s: float) -> dict[str, Times]:
    """Time several calls in turn.

    Args:
        clock: of the device.
        calls: by name; each must have run before.
        budget_s: about how many seconds to spend in all; sets the number of repeats.

    Returns:
        Times by name.
    """
    last = 0.0
    for _ in range(WARM_UP):
        last = sum(clock.once(call)[0] for call in calls.values())
    repeats = int(min(MOST, max(FEWEST, budget_s * 1e3 / max(last, 1e-3))))
    found: dict[str, list[tuple[float, bool]]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(repeats):
        for name in order:
            found[name].append(clock.once(calls[name]))
        order = order[1:] + order[:1]
    return {name: _times(taken) for name, taken in found.items()}


def _times(taken: list[tuple[float, bool]]) -> Times:
    ms = [x for x, _ in taken]
    late = sum(late for _, late in taken)
    return Times(*(percentile(ms, q) for q in (0.5, 0.2, 0.8)), len(taken), late)
