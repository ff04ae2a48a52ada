"""Times of several callables on the same work, taken in turn in one process.

On a GPU: CUDA events around one call, the L2 cache overwritten before it, and the device kept busy
until the host has enqueued the call, so that launch overhead of the host is not in the time. On a
CPU: wall clock. The order rotates from one repeat to the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

MIB = 1 << 20
WARM_UP, FEWEST, MOST = 2, 5, 50
# Clock cycles that the device spins before an event: about 0.3 ms, more than a few launches take.
HEAD_START = 500_000

Call = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Milliseconds: median, 20th and 80th percentile, number of repeats."""

    ms: float
    p20: float
    p80: float
    repeats: int


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

    def once(self, call: Call) -> float:
        """Milliseconds of one call."""
        if not self.cuda:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        self.flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

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
        clock: of the device. calls: by name; each must have run before.
        budget_s: about how many seconds to spend in all; sets the number of repeats.

    Returns:
        Times by name.
    """
    last = 0.0
    for _ in range(WARM_UP):
        last = sum(clock.once(call) for call in calls.values())
    repeats = int(min(MOST, max(FEWEST, budget_s * 1e3 / max(last, 1e-3))))
    found: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(repeats):
        for name in order:
            found[name].append(clock.once(calls[name]))
        order = order[1:] + order[:1]
    return {
        name: Times(percentile(x, 0.5), percentile(x, 0.2), percentile(x, 0.8), repeats)
        for name, x in found.items()
    }
