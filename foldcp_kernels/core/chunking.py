"""Choose how many rows an op works on at once, so that transients stay small."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from foldcp_kernels.core.settings import SETTINGS

# A CPU chunk should stay near the caches and under malloc's mmap threshold; a GPU chunk should
# be large enough to fill the chip.
DEFAULT_BYTES = {"cpu": 8_000_000, "cuda": 256_000_000}
_PARTS = 64
_SMALLEST = 1 / 8
# What all rows take together is not cut up to so many times the bytes of a chunk; beyond, chunks
# become as much smaller as the whole is larger: nothing takes more, and a small input, whose
# kernels are short, is not cut in launches that the host cannot keep up with.
_UNCUT = 3


def set_chunk_bytes(count: int | None) -> None:
    """Fix the transient memory of one chunk, in bytes; None returns to the default per device.

    Raises:
        ValueError: count is not positive.
    """
    if count is not None and count <= 0:
        raise ValueError(f"`count` must be a positive number of bytes, got {count}")
    SETTINGS.chunk_bytes = count


def chunk_bytes(device: torch.device) -> int:
    """Return the transient memory that one chunk may take, in bytes."""
    return SETTINGS.chunk_bytes or DEFAULT_BYTES.get(device.type, DEFAULT_BYTES["cuda"])


def chunk_length(
    total: int, bytes_each: int, device: torch.device, at_most: int = 0, uncut: bool = False
) -> int:
    """Return the rows of one chunk: within the chunk's bytes, and a small part of the whole.

    A small tile is cut in `_PARTS` as well, so that chunks stay small beside it, but not below
    `_SMALLEST` of the chunk's bytes, where launches would cost more than the memory is worth.

    Args:
        total: rows in all.
        bytes_each: transient bytes of one row.
        device: where they live.
        at_most: allow no more than this many chunks (0: no limit).
        uncut: of short kernels on a GPU, see `_UNCUT`.
    """
    uncut = uncut and device.type != "cpu"
    return rows_within(chunk_bytes(device), total, bytes_each, at_most, uncut)


def rows_within(
    budget: int, total: int, bytes_each: int, at_most: int = 0, uncut: bool = False
) -> int:
    """Return `chunk_length` for a number of bytes instead of a device.

    Args:
        budget: bytes of one chunk.
        total: as there.
        bytes_each: as there.
        at_most: as there.
        uncut: as there.
    """
    whole = total * bytes_each
    part = min(budget, max(int(budget * _SMALLEST), whole // _PARTS))
    if uncut:
        part = max(part, min(whole, (_UNCUT * budget) ** 2 // max(1, whole)))
    length = max(1, part // max(1, bytes_each))
    if at_most:
        length = max(length, -(-total // at_most))
    return max(1, min(total, length))


def spans(total: int, length: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of consecutive chunks.

    Args:
        total: elements in all.
        length: of a chunk.
    """
    for lo in range(0, total, length):
        yield lo, min(lo + length, total)


def by_panel(x: Tensor, panels: int) -> Tensor:
    """View positions in panels of equal width: [I, J, ..] -> [panels, I, J / panels, ..].

    Args:
        x: [I, J, ..].
        panels: their number; it divides J.
    """
    return x.unflatten(1, (panels, -1)).transpose(0, 1)


def add_chunks(x: Tensor, dim: int, updates: Iterator[tuple[tuple[int, int], Tensor]]) -> Tensor:
    """Add consecutive chunks of an update to `x`: in place, or out of place under autograd.

    Args:
        x: [...].
        dim: the chunked dimension.
        updates: ((start, stop), update) covering `dim`.

    Returns:
        `x` itself (changed in place) when gradients are off, else a new tensor.
    """
    if torch.is_grad_enabled():
        return x + torch.cat([u for _, u in updates], dim)
    for (lo, hi), update in updates:
        x.narrow(dim, lo, hi - lo).add_(update)
    return x


def map_chunks(
    x: Tensor, dim: int, length: int, change: Callable[[Tensor, tuple[int, int]], Tensor]
) -> Tensor:
    """Change consecutive chunks of `x`: in place, or out of place under autograd.

    Args:
        x: [...].
        dim: the chunked dimension.
        length: of a chunk.
        change: called with a chunk and its (start, stop); changes it in place when gradients are
            off and returns it, else returns a new tensor.

    Returns:
        `x` itself when gradients are off, else a new tensor.
    """
    parts = [change(x.narrow(dim, lo, hi - lo), (lo, hi)) for lo, hi in spans(x.shape[dim], length)]
    return torch.cat(parts, dim) if torch.is_grad_enabled() else x
