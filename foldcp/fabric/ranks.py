"""Join processes to ranks, and send small objects between them without pickles.

An object travels in three transfers: seals and lengths, a description, and the arrays as they are.
Features of several hundred MB are copied neither before nor after.
"""

from __future__ import annotations

import struct
from collections import Counter
from contextlib import suppress
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from foldcp.fabric import message

_HEAD = struct.Struct(f"<Q{message.SEAL}s{message.SEAL}s")
_LONGEST = 1 << 30  # bytes of a description
_SMALL = 1 << 20  # bytes of an array that travels together with others
_NEVER = 0x5EED  # a tag that no message carries


class Ranks:
    """The processes that work on one complex, as torch.distributed joins them.

    Args:
        rank: number of this process.
        size: number of processes.
        device: where this rank's tensors live.
        group: torch.distributed group, None for a single process.
    """

    def __init__(
        self, rank: int, size: int, device: torch.device | str = "cpu", group: Any = None
    ) -> None:
        self.rank, self.size = rank, size
        self.device, self.group = torch.device(device), group
        self.sent_by: Counter[int] = Counter()  # objects that each rank has broadcast

    @property
    def is_root(self) -> bool:
        """True on the rank that reads inputs and writes outputs."""
        return self.rank == 0

    def global_rank(self, rank: int) -> int:
        """Return the number of a rank in the default process group."""
        return dist.get_global_rank(self.group, rank)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.group is not None:
            dist.all_reduce(torch.zeros(1), group=self.group)

    def broadcast_object(self, obj: Any, src: int = 0) -> Any:
        """Give every rank the object of one.

        Args:
            obj: of rank `src`, any value that `message.encode` takes.
            src: the rank that sends.

        Returns:
            The object of rank `src`.

        Raises:
            Forged: this rank received what no rank of this run sent.
            TypeError: on rank `src`: the object may not travel.
        """
        return obj if self.group is None else broadcast(obj, self, src)

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Give every rank the objects of all ranks, in rank order."""
        if self.group is None:
            return [obj]
        return [self.broadcast_object(obj, src) for src in range(self.size)]

    def leave(self) -> None:
        """Forget the group, which is destroyed elsewhere."""
        self.group = None

    def close_connections(self) -> None:
        """Make ranks fail that wait for this one in a collective of gloo.

        Gloo has no abort, and closes its connections only when nothing refers to the group any
        more. A receive that times out closes the connection at once.
        """
        for peer in range(self.size) if self.group is not None else ():
            if peer != self.rank:
                with suppress(RuntimeError):  # the time-out is what closes the connection
                    ask = dist.irecv(torch.empty(1), self.global_rank(peer), self.group, tag=_NEVER)
                    assert ask is not None
                    ask.wait(timedelta(milliseconds=1))


def broadcast(value: Any, ranks: Ranks, src: int) -> Any:
    """Give every rank the value of one; every rank calls it.

    Args:
        value: of rank `src`, see `message.encode`.
        ranks: several ranks.
        src: who sends.

    Raises:
        Forged: on a rank that received what no rank of this run sent.
        TypeError: on rank `src`: the value may not travel.
    """
    ranks.sent_by[src] += 1
    context = f"object {ranks.sent_by[src]} of rank {src}"
    if ranks.rank == src:
        _send(value, ranks, src, context)
        return value
    head = _receive(_HEAD.size, ranks, src)
    length, of_text, of_arrays = _HEAD.unpack(_raw(head))
    if length > _LONGEST:
        raise message.Forged(context, "it is too long")
    text = _raw(_receive(length, ranks, src))
    message.check(context, of_text, text)
    with message.reading(context):
        sizes = message.sizes(text)
    joined = _receive(sum(size for size in sizes if size < _SMALL), ranks, src)
    arrays, lo = [], 0
    for size in sizes:
        if size < _SMALL:
            arrays.append(joined[lo : lo + size].clone())
            lo += size
        else:
            arrays.append(_receive(size, ranks, src))
    message.check(f"arrays of {context}", of_arrays, *(x.numpy() for x in arrays))
    with message.reading(context):
        return message.decode(text, arrays)


def _send(value: Any, ranks: Ranks, src: int, context: str) -> None:
    text, arrays = message.encode(value)
    seals = message.seal(context, text), message.seal(f"arrays of {context}", *arrays)
    small = b"".join(x for x in arrays if len(x) < _SMALL)
    large = [x for x in arrays if len(x) >= _SMALL]
    parts: tuple[bytes | memoryview, ...] = (_HEAD.pack(len(text), *seals), text, small, *large)
    for part in parts:
        _transfer(_tensor(part), ranks, src)


def _tensor(part: bytes | memoryview) -> Tensor:
    array = np.frombuffer(part, np.uint8)
    # torch warns of memory that it must not write to.
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _receive(size: int, ranks: Ranks, src: int) -> Tensor:
    found = torch.empty(size, dtype=torch.uint8)
    _transfer(found, ranks, src)
    return found


def _transfer(part: Tensor, ranks: Ranks, src: int) -> None:
    if part.numel():
        dist.broadcast(part, ranks.global_rank(src), ranks.group)


def _raw(x: Tensor) -> bytes:
    return x.numpy().tobytes()
