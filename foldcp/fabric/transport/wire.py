"""The wire format of regions: parts of a message, raw or FP8 with one scale per segment.

An FP8 part holds, per segment of 128 consecutive elements of the packed piece (for keys and values
these are 128 channels), a float32 scale, then one e4m3 byte per element. The scale is the smallest
power of two that brings the segment's largest magnitude to at most 448. Decoding is therefore exact
in float32 and bf16, a second trip loses nothing more (a ring forwards panels), and an element x is
off by at most max(|x| / 16, scale / 1024). A NaN or an infinity makes its whole segment NaN.

The functions here are the torch twins of csrc/wire/view.cpp and csrc/wire/pack.cu, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

SEGMENT = 128  # elements that share a scale
ALIGN = 16  # bytes; of each part in a message
LARGEST = 448.0  # of e4m3
FP8_THERE = "fp8-there"  # as FP8, with its gradient raw on the way back
STAGING_ALIGN = 256  # bytes; of each message in a staging buffer


@dataclass(frozen=True, eq=False)
class Message:
    """Pieces that travel between this rank and one peer in one step and direction.

    Args:
        peer: the other rank.
        views: the pieces, strided views of sources or regions.
        fp8: for each piece, whether it travels as FP8.
        held: it sends something that the step before has brought.
        runs: equal transfers that it is cut in; one piece, where there are several.
    """

    peer: int
    views: tuple[Tensor, ...]
    fp8: tuple[bool, ...]
    held: bool = False
    runs: int = 1

    def bytes(self) -> int:
        """Return the bytes on the wire."""
        end = 0
        for view, fp8 in zip(self.views, self.fp8, strict=True):
            end = aligned(end) + part_bytes(view.numel(), view.element_size(), fp8)
        return end

    def direct(self) -> bool:
        """Tell whether it is one raw piece with contiguous transfers, which needs no packing."""
        view = self.views[0]
        return (
            len(self.views) == 1
            and not self.fp8[0]
            and in_runs(tuple(view.shape), view.stride(), self.runs)
        )


def in_runs(shape: tuple[int, ...], stride: tuple[int, ...], runs: int) -> bool:
    """Tell whether a view splits into that many equal parts, each contiguous in memory.

    Args:
        shape: of the view.
        stride: of the view.
        runs: number of parts.
    """
    inner, total = 1, prod(shape)
    for n, step in zip(reversed(shape), reversed(stride), strict=True):
        if n == 1:
            continue
        if step != inner:
            break
        inner *= n
    return total == 0 or inner % (total // runs) == 0


def aligned(count: int, to: int = ALIGN) -> int:
    """Round `count` bytes up.

    Args:
        count: bytes.
        to: multiple of the result.
    """
    return -(-count // to) * to


def part_bytes(elements: int, itemsize: int, fp8: bool) -> int:
    """Return the bytes of one piece on the wire, without alignment.

    Args:
        elements: of the piece.
        itemsize: bytes of an element.
        fp8: it travels as FP8.
    """
    return _scale_bytes(elements) + elements if fp8 else elements * itemsize


def _scale_bytes(elements: int) -> int:
    return aligned(4 * -(-elements // SEGMENT))


def staging_bytes(messages: Sequence[Message]) -> int:
    """Return the bytes of the buffers that these messages are packed in."""
    return sum(aligned(m.bytes(), STAGING_ALIGN) for m in messages if not m.direct())


def pack(message: Message, device: torch.device) -> Tensor:
    """Pack the message into bytes: [bytes], uint8.

    Args:
        message: the pieces.
        device: of the result.
    """
    if message.runs == 1 and message.direct():
        return message.views[0].reshape(-1).view(torch.uint8)
    buffer = torch.empty(message.bytes(), dtype=torch.uint8, device=device)
    for part, view, fp8 in _parts(buffer, message):
        if fp8:
            scales, payload = encode(view)
            part[: 4 * scales.numel()].copy_(scales.view(torch.uint8))
            part[_scale_bytes(view.numel()) :].copy_(payload)
        else:
            part.view(view.dtype).view(view.shape).copy_(view)
    return buffer


def unpack(buffer: Tensor, message: Message) -> None:
    """Write the pieces of a message that has arrived into its views.

    Args:
        buffer: [bytes], uint8.
        message: the views to write.
    """
    for part, view, fp8 in _parts(buffer, message):
        if fp8:
            scales = part[: 4 * -(-view.numel() // SEGMENT)].view(torch.float32)
            decoded = decode(scales, part[_scale_bytes(view.numel()) :])
            # The number next to the largest of a type may have been rounded up: it stays finite.
            largest = torch.finfo(view.dtype if view.itemsize < 4 else torch.float32).max
            view.copy_(decoded.clamp_(-largest, largest).view(view.shape))
        else:
            view.copy_(part.view(view.dtype).view(view.shape))


def _parts(buffer: Tensor, message: Message) -> list[tuple[Tensor, Tensor, bool]]:
    out, end = [], 0
    for view, fp8 in zip(message.views, message.fp8, strict=True):
        start = aligned(end)
        end = start + part_bytes(view.numel(), view.element_size(), fp8)
        if view.numel():
            out.append((buffer[start:end], view, fp8))
    return out


def encode(x: Tensor) -> tuple[Tensor, Tensor]:
    """Encode a piece as FP8.

    Args:
        x: floating point, any shape and strides.

    Returns:
        scales [segments], float32; payload [elements], uint8 (the bits of e4m3).
    """
    flat = x.to(torch.float32).reshape(-1)
    missing = -flat.numel() % SEGMENT
    rows = torch.nn.functional.pad(flat, (0, missing)).view(-1, SEGMENT)
    most = rows.abs().amax(1)  # NaN where there is one
    mantissa, exponent = torch.frexp(most / LARGEST)
    exponent = (exponent - (mantissa == 0.5).to(exponent.dtype)).clamp(min=-126)
    exponent = torch.where(mantissa == 0, torch.full_like(exponent, -126), exponent)  # underflow
    scales = torch.ldexp(torch.ones_like(most), exponent)
    scales = torch.where(most == 0, torch.ones_like(scales), scales)
    scales = torch.where(most.isfinite(), scales, torch.full_like(scales, torch.nan))
    # Casts beyond the range saturate in some versions of torch and give NaN in others.
    scaled = (rows / scales[:, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return scales, scaled.view(torch.uint8).view(-1)[: flat.numel()]


def decode(scales: Tensor, payload: Tensor) -> Tensor:
    """Decode the numbers of a piece: [elements], float32.

    Args:
        scales: of each segment, float32.
        payload: FP8 numbers.
    """
    values = payload.view(torch.float8_e4m3fn).to(torch.float32)
    return values * scales.repeat_interleave(SEGMENT)[: payload.numel()]
