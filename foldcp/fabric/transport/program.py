"""Programs of exchanges: memory operations worked out once per plan and tensor layout.

A program names base tensors by number (the sources, then the memory that regions lie in) and every
piece by base, offset, sizes and strides. Replaying it takes the tensors alone.

A piece travels without being packed where it is one run of memory at both ends, or a few long ones.
How many follows from the boxes that both ends know and from the sizes of the tensor beside them,
never from the strides that a rank happens to have: what cannot be sent from where it lies is packed
there, and looks the same on the wire.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from foldcp.fabric.transport.wire import Message, aligned, in_runs, part_bytes
from foldcp.layout.tiles import Box

Dims = tuple[int, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """A strided view of a base tensor; strides and offset in elements."""

    base: int
    dtype: torch.dtype
    shape: Shape
    stride: Shape
    offset: int

    def cut(self, dims: Dims, origin: Box, box: Box) -> Place:
        """Cut out the part over `box`; `dims` start at `origin`.

        Args:
            dims: dimensions that boxes refer to.
            origin: the box of the whole.
            box: the box of the part.
        """
        shape, offset = list(self.shape), self.offset
        for d, (lo, _), (a, b) in zip(dims, origin, box, strict=True):
            offset += (a - lo) * self.stride[d]
            shape[d] = b - a
        return Place(self.base, self.dtype, tuple(shape), self.stride, offset)

    def of(self, tensor: Tensor) -> Tensor:
        """View the base, a source or memory of regions."""
        if tensor.dtype is not self.dtype:
            tensor = tensor.view(self.dtype)
        return tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.offset)


@dataclass(frozen=True)
class Parcel:
    """A message of a program; fields as of `foldcp.fabric.transport.wire.Message`."""

    peer: int
    places: tuple[Place, ...]
    fp8: tuple[bool, ...]
    held: bool
    runs: int

    def bytes(self) -> int:
        """Return the bytes on the wire."""
        end = 0
        for p, fp8 in zip(self.places, self.fp8, strict=True):
            end = aligned(end) + part_bytes(prod(p.shape), p.dtype.itemsize, fp8)
        return end

    def direct(self) -> bool:
        """Tell whether it needs no packing here."""
        p = self.places[0]
        return len(self.places) == 1 and not self.fp8[0] and in_runs(p.shape, p.stride, self.runs)

    def of(self, bases: Sequence[Tensor | None]) -> Message:
        """Return the message with its tensors."""
        views = tuple(p.of(bases[p.base]) for p in self.places)  # type: ignore[arg-type]
        return Message(self.peer, views, self.fp8, self.held, self.runs)


@dataclass(frozen=True)
class Act:
    """One step of a program.

    Args:
        made: where each want comes together, None for one that is a part of a source.
        whole: the parts of sources that are wants, None for the others.
        local: (from, to) of what this rank copies itself.
        sends: messages to send.
        recvs: messages to receive.
        sent: bytes sent.
        received: bytes received.
        staged: bytes packed.
        forwards: it sends something that the step before has brought.
        layout: a number for `made`.
    """

    made: tuple[Place | None, ...]
    whole: tuple[Place | None, ...]
    local: tuple[tuple[Place, Place], ...]
    sends: tuple[Parcel, ...]
    recvs: tuple[Parcel, ...]
    sent: int
    received: int
    staged: int
    forwards: bool
    layout: int

    def messages(self, bases: Sequence[Tensor | None]) -> tuple[list[Message], list[Message]]:
        """Return messages with their tensors, for a transport that replays no programs."""
        return [p.of(bases) for p in self.sends], [p.of(bases) for p in self.recvs]


@dataclass(eq=False)
class Program:
    """An exchange of certain tensors.

    Args:
        acts: its steps.
        sources: number of them; bases beyond are regions: with one step a tensor per want, with
            several one buffer for the even and one for the odd steps.
        region_bytes: most bytes of a slot's regions.
        staging_bytes: most bytes of a slot's staging buffers.
        devices: of the sources.
        handles: what transports know it by.
    """

    acts: tuple[Act, ...]
    sources: int
    region_bytes: int
    staging_bytes: int
    devices: tuple[torch.device, ...]
    handles: dict[str, int] = field(default_factory=dict)

    def kept_by(self, owner: str, handle: int, drop: Any) -> int:
        """Remember what an owner knows it by, until the program is gone.

        Args:
            owner: who knows it by `handle`.
            handle: the owner's name for it.
            drop: called with the handle when the program is freed.
        """
        self.handles[owner] = handle
        weakref.finalize(self, drop, handle).atexit = False
        return handle

    def flat(self) -> list[int]:
        """All messages as numbers, as csrc/engine/program.h reads them."""
        out = [len(self.acts)]
        for act in self.acts:
            out += [act.forwards, len(act.sends) + len(act.recvs)]
            for send, parcels in ((1, act.sends), (0, act.recvs)):
                for m in parcels:
                    out += [send, m.peer, m.runs, len(m.places)]
                    for p, fp8 in zip(m.places, m.fp8, strict=True):
                        item = p.dtype.itemsize
                        out += [p.base, p.offset * item, item, _TYPES.get(p.dtype, 0), fp8]
                        out += [len(p.shape), *p.shape, *p.stride]
        return [int(x) for x in out]


# As in csrc/wire/view.h.
_TYPES = {torch.float64: 1, torch.float32: 2, torch.float16: 3, torch.bfloat16: 4}


def contiguous(shape: Shape) -> Shape:
    """Return the strides of a tensor without gaps."""
    out = [1]
    for n in reversed(shape[1:]):
        out.append(out[-1] * n)
    return tuple(reversed(out[: len(shape)]))


def shape_over(like: Sequence[int], dims: Dims, box: Box) -> Shape:
    """Return the shape of a tensor with other boxes.

    Args:
        like: the tensor's shape.
        dims: dimensions that the box refers to.
        box: their new spans.
    """
    shape = list(like)
    for d, (lo, hi) in zip(dims, box, strict=True):
        shape[d] = max(0, hi - lo)
    return tuple(shape)
