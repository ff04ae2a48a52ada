"""Rows of matrices on their way to disk: no N x N matrix is ever whole in memory.

Rows are appended to one raw file per matrix as they arrive. A matrix that is complete is packed in
the background as the `.npz` file that numpy.savez_compressed would have written, chunk by chunk.
"""

from __future__ import annotations

import os
import queue
import threading
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Result = TypeVar("Result")
Key = tuple[str, int]  # (name of a matrix, sample)

_CHUNK = 4_000_000  # bytes that are packed or copied at once
# zlib's fastest level: expected errors in float32 shrink by 11 % with it and by 12 % with level 6,
# which takes a third longer.
_LEVEL = 1
_DTYPES = {torch.float32: "<f4", torch.float64: "<f8"}


class Stopped(Exception):
    """A matrix was given up while it was packed."""


class Background:
    """Threads that work through a queue. Unlike an executor's they never hold up an exit.

    Args:
        threads: how many at most; they start with the work and end with `close`.
    """

    def __init__(self, threads: int) -> None:
        self._most, self._running = threads, 0
        self._queue: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]
        self._queue = queue.SimpleQueue()

    def submit(self, work: Callable[[], Result]) -> Future[Result]:
        """Queue some work; its result or exception is in the future returned."""
        future: Future[Result] = Future()
        self._queue.put((work, future))
        if self._running < self._most:
            self._running += 1
            threading.Thread(target=self._serve, args=(self._queue,), daemon=True).start()
        return future

    def close(self) -> None:
        """Let the threads end after what is queued now; later work starts others."""
        for _ in range(self._running):
            self._queue.put(None)
        self._queue, self._running = queue.SimpleQueue(), 0

    @staticmethod
    def _serve(work: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]) -> None:
        while (item := work.get()) is not None:
            try:
                item[1].set_result(item[0]())
            except BaseException as error:  # for whoever asks for the result
                item[1].set_exception(error)
            del item  # or what it holds would live until the next one comes


@dataclass
class _Growing:
    """A raw file under way: the next row, and the type and shape of the whole."""

    file: BinaryIO
    row: int
    dtype: str
    shape: tuple[int, ...]


class Spool:
    """A `MatrixSink` on disk.

    An error of the disk does not interrupt the prediction, in which other ranks take part: `rows`
    drops what follows, and `keys` raises it.

    Args:
        folder: an empty folder for this prediction's matrices; its owner removes it.
        background: where matrices are packed.
        hurry: once set, matrices are stored without compression, which takes a tenth of the time.
        expected: all matrices that there will be, for whoever completes the prediction.
    """

    def __init__(
        self,
        folder: Path,
        background: Background,
        hurry: threading.Event,
        expected: Sequence[Key] = (),
    ) -> None:
        self.expected = expected
        self._folder, self._background, self._hurry = folder, background, hurry
        self._growing: dict[Key, _Growing] = {}
        self._packed: dict[Key, Future[Path]] = {}
        self._error: OSError | None = None
        self._stop = threading.Event()

    def rows(self, name: str, sample: int, lo: int, values: Tensor) -> None:
        """Append rows to a matrix. See `MatrixSink`.

        Args:
            name: of the matrix.
            sample: index of the sample.
            lo: first row.
            values: the rows [rows, N], or [rows, N, C].

        Raises:
            ValueError: rows are missing or come twice.
        """
        if self._error is not None:
            return
        try:
            self._append((name, sample), lo, values)
        except OSError as error:
            self._error = error
            self._close_files()

    def _append(self, key: Key, lo: int, values: Tensor) -> None:
        values = values.detach() if values.dtype in _DTYPES else values.detach().float()
        if key not in self._growing and key not in self._packed:
            file = self._raw(key).open("wb")
            shape = (values.shape[1], *values.shape[1:])
            self._growing[key] = _Growing(file, 0, _DTYPES[values.dtype], shape)
        growing = self._growing.get(key)
        if growing is None or lo != growing.row:
            expected = "no more" if growing is None else growing.row
            raise ValueError(f"row {lo} of {key[0]} of sample {key[1]}; expected {expected}")
        step = max(1, _CHUNK // (values[0].numel() * values.element_size()))
        for part in values.split(step):
            growing.file.write(memoryview(part.cpu().contiguous().numpy()).cast("B"))
        growing.row += values.shape[0]
        if growing.row == growing.shape[0]:
            growing.file.close()
            del self._growing[key]
            self._packed[key] = self._background.submit(lambda: self._pack(key, growing))

    def _raw(self, key: Key) -> Path:
        return self._folder / f"{key[0]}_{key[1]}.raw"

    def _pack(self, key: Key, matrix: _Growing) -> Path:
        raw, packed = self._raw(key), self._folder / f"{key[0]}_{key[1]}.npz"
        # Stock's embeddings have a batch dimension, its errors none.
        shape = (1, *matrix.shape) if key[0] == "z" else matrix.shape
        pack(raw, packed, key[0], matrix.dtype, shape, self._hurry, self._stop)
        raw.unlink()
        return packed

    def keys(self) -> list[Key]:
        """Return (name, sample) of every matrix, once all rows are here.

        Raises:
            OSError: a file could not be written.
            ValueError: rows of some matrix are missing.
        """
        if self._error is not None:
            raise self._error
        if self._growing:
            name, sample = next(iter(self._growing))
            raise ValueError(f"rows of {name} of sample {sample} are missing")
        return list(self._packed)

    def packed(self, key: Key) -> Path:
        """Wait until one matrix is on disk, and return its file.

        Raises:
            OSError: it could not be written.
        """
        return self._packed[key].result()

    def close(self) -> None:
        """Give up what is not packed; afterwards nothing more is written to the folder."""
        self._stop.set()
        self._close_files()
        wait(self._packed.values())

    def _close_files(self) -> None:
        for growing in self._growing.values():
            try:
                growing.file.close()
            except OSError:  # what was still to be written is given up
                continue
        self._growing.clear()


def pack(
    raw: Path,
    target: Path,
    member: str,
    dtype: str,
    shape: tuple[int, ...],
    hurry: threading.Event | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Write one array of an `.npz` file from its raw bytes, and wait until it is on disk.

    Args:
        raw: the numbers, C order.
        target: the `.npz` file.
        member: name of the array.
        dtype: of the array, such as "<f4".
        shape: of the array.
        hurry: once set, the array is stored without compression.
        stop: once set, no more is written.

    Raises:
        OSError: the disk is full, or something like it.
        Stopped: `stop` was set.

    Source: numpy.lib.format (NPY 1.0), numpy.savez_compressed; APPNOTE.TXT of PKWARE (ZIP64).
    """
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    while True:
        plain = hurry is not None and hurry.is_set()
        method = zipfile.ZIP_STORED if plain else zipfile.ZIP_DEFLATED
        with target.open("wb") as file:
            archive = zipfile.ZipFile(file, "w", method, compresslevel=_LEVEL)
            with archive, archive.open(f"{member}.npy", "w", force_zip64=True) as out:
                np.lib.format.write_array_header_1_0(out, header)
                whole = _copy(raw, out, None if plain else hurry, stop)
            sync(file)
        if whole:
            return


def _copy(
    source: Path, out: Any, hurry: threading.Event | None, stop: threading.Event | None
) -> bool:
    """Copy a file in chunks; False when asked to hurry before the end."""
    with source.open("rb") as file:
        while chunk := file.read(_CHUNK):
            if stop is not None and stop.is_set():
                raise Stopped
            if hurry is not None and hurry.is_set():
                return False
            out.write(chunk)
    return True


def append(archive: Path, member: str, array: NDArray[Any]) -> None:
    """Add a small array to an `.npz` file, and wait until it is on disk.

    Args:
        archive: the `.npz` file.
        member: name of the array.
        array: the array.
    """
    with archive.open("r+b") as file:
        found = zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED)
        with found, found.open(f"{member}.npy", "w", force_zip64=True) as out:
            np.lib.format.write_array(out, array)
        sync(file)


def sync(file: Any) -> None:
    """Wait until what was written to a file is on disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_path(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
