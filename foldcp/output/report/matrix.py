"""Read an N x N matrix of a results folder as an image, a few rows at a time."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from foldcp.runtime.files.names import open_regular

_AT_ONCE = 1 << 24  # bytes of rows that are read at once, at least one row
_LARGEST = 1 << 20  # tokens


def reduced(path: Path, key: str, most: int) -> tuple[NDArray[Any], int]:
    """Read a square matrix, with squares of its elements averaged so that it is small.

    Args:
        path: of an .npz file.
        key: of the matrix in it.
        most: rows and columns of what is returned, at most.

    Returns:
        [n, n] float32, NaN where a square holds a number that is not finite, and the number of rows
        of the matrix in the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no square matrix of numbers under this key, or not all of it.
        zipfile.BadZipFile: it is no .npz file.
    """
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        if f"{key}.npy" not in archive.namelist():
            raise ValueError(f"{path.name} holds no {key}")
        with archive.open(f"{key}.npy") as stream:
            shape, dtype = _header(stream)
            n = shape[0] if len(shape) == 2 and shape[0] == shape[1] else 0
            if not 0 < n <= _LARGEST:
                raise ValueError(f"{key} in {path.name} has shape {shape}; expected N x N")
            return _averaged(stream, n, dtype, most), n


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    form: Any = np.lib.format
    version = form.read_magic(stream)
    read = {(1, 0): form.read_array_header_1_0, (2, 0): form.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"an .npy file of version {version}; expected 1.0 or 2.0")
    shape, columns_first, dtype = read(stream)
    if columns_first or dtype.kind not in "fiu":
        raise ValueError("the matrix is no numbers, row by row")
    return shape, dtype


def _averaged(stream: IO[bytes], n: int, dtype: np.dtype[Any], most: int) -> NDArray[Any]:
    """Read the rows and average squares of them; the last may be smaller."""
    side = -(-n // most)  # of a square
    starts = np.arange(0, n, side)
    widths = np.diff(np.append(starts, n))
    out = np.zeros((len(starts), len(starts)), np.float32)
    squares = max(1, _AT_ONCE // (side * n * dtype.itemsize))  # read at once
    for at in range(0, len(starts), squares):
        count = int(widths[at : at + squares].sum())
        data = stream.read(count * n * dtype.itemsize)
        if len(data) != count * n * dtype.itemsize:
            raise ValueError(f"the file ends before row {starts[at] + count} of {n}")
        rows = np.frombuffer(data, dtype).reshape(count, n).astype(np.float64)
        sums = np.add.reduceat(rows, starts, axis=1)
        sums = np.add.reduceat(sums, starts[at : at + squares] - starts[at], axis=0)
        out[at : at + squares] = sums / np.outer(widths[at : at + squares], widths)
    return np.where(np.isfinite(out), out, np.float32(np.nan))
