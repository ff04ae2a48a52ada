"""Measure how long each stage of a run takes on a rank, and the memory that it peaks at."""

from __future__ import annotations

import resource
import sys
import time


class Stages:
    """The stages of one rank, in the order in which they first began.

    A stage lasts until the next one begins, by the host's clock: what a GPU is still doing then
    counts for the stage in which the host waits for it.

    Attributes:
        peak_gpu_bytes: largest memory allocated on the GPU; the counter of torch restarts with
            each stage.
    """

    def __init__(self) -> None:
        self._of: dict[str, dict[str, float]] = {}
        self._name, self._since = "", 0.0
        self.peak_gpu_bytes = 0

    def begin(self, name: str) -> None:
        """Begin a stage, and with that end the one before it.

        Args:
            name: of the stage; one that comes again is added up.
        """
        now, gpu = time.perf_counter(), _peak_gpu_bytes()
        self.peak_gpu_bytes = max(self.peak_gpu_bytes, gpu)
        if self._name:
            own = self._of.setdefault(self._name, {"seconds": 0.0, "peak_bytes": 0})
            own["seconds"] += now - self._since
            own["peak_bytes"] = max(own["peak_bytes"], gpu or peak_host_bytes())
        self._name, self._since = name, now

    def end(self) -> dict[str, dict[str, float]]:
        """End the stage under way.

        Returns:
            By name of the stage: `seconds`, and `peak_bytes`, of a GPU the peak within the stage,
            without one the host's largest memory up to its end.
        """
        self.begin("")
        return self._of


def _peak_gpu_bytes() -> int:
    """Read and restart the counter of the GPU's memory; 0 without a GPU."""
    import torch

    if not torch.cuda.is_initialized():
        return 0
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def peak_host_bytes() -> int:
    """Return the largest memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
