"""Keep what recordings leave in CUDA as long as the process lives, whatever mesh they were of.

Two things are process-wide because the libraries keep them so. cuBLAS keeps a workspace for every
stream that it was used on, so all recordings of a device share one stream. Torch's allocator keeps
the address of a graph whose capture was cut short, so that graph must never be freed.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

_cut_short: list[Any] = []


@cache
def stream(device: torch.device) -> Any:
    """Return the stream of all recordings of a device."""
    return torch.cuda.Stream(device)


def keep(graph: Any) -> None:
    """Keep a graph whose capture was cut short."""
    _cut_short.append(graph)


def cut_short() -> int:
    """Count the graphs that are kept."""
    return len(_cut_short)
