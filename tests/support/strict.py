"""What every test process, spawned ranks included, sets in torch first."""

from __future__ import annotations

import torch


def strict() -> None:
    """Use one thread, and fill memory from `torch.empty` with NaN so that reading it shows.

    The fill is part of torch's deterministic mode; `warn_only` because nothing else of that mode
    is wanted here.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
