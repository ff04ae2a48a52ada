"""Encode a matrix as a PNG with a palette of 256 colours."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_DEPTH, _PALETTE = 8, 3  # bits per pixel, colour type


def encode(pixels: NDArray[np.uint8], palette: Sequence[tuple[int, int, int]]) -> bytes:
    """Return the image as a file.

    Args:
        pixels: [height, width], positions in the palette.
        palette: red, green and blue of up to 256 colours.

    Raises:
        ValueError: the matrix is empty or not of two axes, or a pixel has no colour.

    Source: PNG, third edition, sections 5 and 11 (https://www.w3.org/TR/png-3/).
    """
    if pixels.ndim != 2 or 0 in pixels.shape:
        raise ValueError(f"`pixels` must be [height, width] and not empty, got {pixels.shape}")
    if not int(pixels.max()) < len(palette) <= 256:
        raise ValueError(f"`palette` has {len(palette)} colours; pixels go up to {pixels.max()}")
    height, width = pixels.shape
    rows = np.zeros((height, width + 1), np.uint8)  # each row begins with its filter, 0: none
    rows[:, 1:] = pixels
    header = struct.pack(">IIBBBBB", width, height, _DEPTH, _PALETTE, 0, 0, 0)
    colours = bytes(part for colour in palette for part in colour)
    data = zlib.compress(rows.tobytes(), 9)
    parts = ((b"IHDR", header), (b"PLTE", colours), (b"IDAT", data), (b"IEND", b""))
    return _SIGNATURE + b"".join(_chunk(kind, body) for kind, body in parts)


def _chunk(kind: bytes, body: bytes) -> bytes:
    check = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)
