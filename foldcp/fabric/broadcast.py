"""One rank's object on every rank of a mesh, through torch.distributed and without pickles.

Three transfers: seals and lengths, a description, and the arrays as they are: features of several
hundred MB are copied neither before nor after.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from foldcp.fabric import message

if TYPE_CHECKING:
    from foldcp.fabric.mesh import Mesh

_HEAD = struct.Struct(f"<Q{message.SEAL}s{message.SEAL}s")
_LONGEST = 1 << 30  # bytes of a description
_SMALL = 1 << 20  # bytes of an array that travels together with others


def broadcast(value: Any, mesh: Mesh, src: int) -> Any:
    """Give every rank the value of one; all ranks of the mesh call it.

    Args:
        value: of rank `src`, see `message.encode`.
        mesh: of several ranks.
        src: who sends.

    Raises:
        Forged: on a rank that received what no rank of this run sent.
        TypeError: on rank `src`: the value may not travel.
    """
    mesh.told[src] += 1
    context = f"object {mesh.told[src]} of rank {src}"
    if mesh.rank == src:
        _send(value, mesh, src, context)
        return value
    head = _receive(_HEAD.size, mesh, src)
    length, of_text, of_arrays = _HEAD.unpack(_raw(head))
    if length > _LONGEST:
        raise message.Forged(context, "it is too long")
    text = _raw(_receive(length, mesh, src))
    message.check(context, of_text, text)
    with message.reading(context):
        sizes = message.sizes(text)
    joined = _receive(sum(size for size in sizes if size < _SMALL), mesh, src)
    arrays, lo = [], 0
    for size in sizes:
        if size < _SMALL:
            arrays.append(joined[lo : lo + size].clone())
            lo += size
        else:
            arrays.append(_receive(size, mesh, src))
    message.check(f"arrays of {context}", of_arrays, *(x.numpy() for x in arrays))
    with message.reading(context):
        return message.decode(text, arrays)


def _send(value: Any, mesh: Mesh, src: int, context: str) -> None:
    text, arrays = message.encode(value)
    seals = message.seal(context, text), message.seal(f"arrays of {context}", *arrays)
    small = b"".join(x for x in arrays if len(x) < _SMALL)
    large = [x for x in arrays if len(x) >= _SMALL]
    parts: tuple[bytes | memoryview, ...] = (_HEAD.pack(len(text), *seals), text, small, *large)
    for part in parts:
        _transfer(_tensor(part), mesh, src)


def _tensor(part: bytes | memoryview) -> Tensor:
    array = np.frombuffer(part, np.uint8)
    # torch warns of memory that it must not write to.
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _receive(size: int, mesh: Mesh, src: int) -> Tensor:
    found = torch.empty(size, dtype=torch.uint8)
    _transfer(found, mesh, src)
    return found


def _transfer(part: Tensor, mesh: Mesh, src: int) -> None:
    if part.numel():
        dist.broadcast(part, mesh.global_rank(src), mesh.group)


def _raw(x: Tensor) -> bytes:
    return x.numpy().tobytes()
