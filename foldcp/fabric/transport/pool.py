"""Buffers that exchanges use one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

_ROUND = 1 << 16  # bytes
# What is kept for the next user: enough for small exchanges, of which there are many. Large buffers
# go back to torch's allocator, so that they are not held while something else needs the memory.
_KEPT = 16 << 20  # bytes


class Pool:
    """Byte buffers of one device, taken and given back.

    A returned buffer may still be used by work already queued; the next user must run on the same
    stream. Exchanges do, see csrc/engine/engine.h.

    Args:
        device: of the buffers.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free: list[Tensor] = []

    def take(self, count: int) -> Tensor:
        """Take a buffer of at least `count` bytes: uint8, its content undefined."""
        fitting = [i for i, x in enumerate(self._free) if x.numel() >= count]
        if fitting:
            return self._free.pop(min(fitting, key=lambda i: self._free[i].numel()))
        self._free.clear()  # too small: the larger one takes their place
        size = -(-count // _ROUND) * _ROUND if count else 0
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def give(self, buffer: Tensor) -> None:
        """Take a buffer back."""
        if buffer.numel() + sum(x.numel() for x in self._free) <= _KEPT:
            self._free.append(buffer)

    def clear(self) -> None:
        """Forget all buffers that are not in use."""
        self._free.clear()
