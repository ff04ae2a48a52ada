"""Predictions on their way to disk: a folder gets its final name when all that is in it is there.

A prediction is made in `.partial_<run>_<id>` beside the folder of predictions. What takes long,
packing its N x N matrices, goes on in the background while the next input is folded. Boltz takes a
prediction for finished when its folder exists, so the folder is renamed last, as a whole.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from foldcp.output.spool import Background, Key, Spool, append, sync_path
from foldcp.runtime.files import disk
from foldcp.runtime.files.names import LONGEST, Unsafe, check, inside
from foldcp.runtime.files.seal import Seal

_PACKERS = min(4, os.cpu_count() or 1)
_MOMENT = 0.3  # seconds


@dataclass(frozen=True)
class Matrices:
    """The matrices of one prediction and what their files are called.

    Args:
        spool: holds them.
        ranks: rank of each sample by confidence, 0 is the best.
        s: [1, N, C], the single representation, for the embeddings beside `z`.
    """

    spool: Spool
    ranks: Sequence[int]
    s: NDArray[Any] | None = None


class Outputs:
    """Finishes predictions in the background.

    Args:
        folder: of the predictions; each becomes a folder in it.
        on_failure: called with a prediction's name and what went wrong, from another thread.
        seal: of this run's lock; what is written once that is lost gets no final name.
    """

    def __init__(
        self, folder: Path, on_failure: Callable[[str, str], None], seal: Seal | None = None
    ) -> None:
        self.folder, self._on_failure, self._seal = folder, on_failure, seal
        self._tag = seal.tag if seal is not None else "alone"
        self._packers, self._finisher = Background(_PACKERS), Background(1)
        self._hurry, self._abandoned = threading.Event(), threading.Event()
        self._pending: list[Future[None]] = []
        self._spools: dict[str, Spool] = {}
        self._finished: deque[str] = deque()

    def partial(self, name: str) -> Path:
        """Return the folder in which a prediction is made."""
        return self.folder.parent / f".partial_{self._tag}_{name}"

    def check_ours(self) -> None:
        """Refuse to go on where another run has taken the folder.

        Raises:
            Lost: it has.
        """
        if self._seal is not None:
            self._seal.check()

    def begin(self, name: str) -> Path:
        """Make an empty folder for a prediction, in the place of what an earlier run left there."""
        partial = self.partial(check(name, "the prediction's name", LONGEST))
        if partial.is_symlink() or partial.is_file():
            partial.unlink()
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return partial

    def spool(self, name: str, matrix_bytes: Mapping[Key, int]) -> Spool:
        """Begin a prediction and return what takes its matrices.

        Args:
            name: of the prediction.
            matrix_bytes: of each matrix to come; the prediction is complete with all of them.

        Raises:
            OSError: the disk has not enough room, or cannot be written.
        """
        self._check_room(list(matrix_bytes.values()))
        raw = self.begin(name) / "raw"
        raw.mkdir()
        self._spools[name] = Spool(raw, self._packers, self._hurry, tuple(matrix_bytes))
        return self._spools[name]

    def _check_room(self, matrix_bytes: Sequence[int]) -> None:
        # While one is packed, a matrix is there twice.
        need = sum(matrix_bytes) + max(matrix_bytes, default=0) * min(_PACKERS, len(matrix_bytes))
        for _ in range(2):
            free = shutil.disk_usage(self.folder).free
            if free >= need:
                return
            wait(self._pending)  # they give room back
        raise OSError(
            None,
            f"its matrices need {need / 1e9:.3g} GB of disk and {free / 1e9:.3g} GB are free",
        )

    def complete(self, name: str, matrices: Matrices | None = None) -> None:
        """Finish a prediction in the background: everything but its matrices is written.

        Args:
            name: of the prediction.
            matrices: None when it has none outside its files.
        """
        self._spools.pop(name, None)
        self._pending = [job for job in self._pending if not job.done()]
        job = self._finisher.submit(lambda: self._finish(name, matrices))
        self._pending.append(job)
        # Most are on disk before the next input begins: a run that is then killed keeps them.
        wait([job], timeout=None if matrices is None else _MOMENT)

    def _finish(self, name: str, matrices: Matrices | None) -> None:
        try:
            self._gather(name, matrices)
            if not self._abandoned.is_set():
                self.check_ours()
                replace(self.partial(name) / name, self.folder / name, f"affinity_{name}.json")
                self._finished.append(name)
        except Exception as error:  # whatever it is, this input must not seem to be done
            self._on_failure(name, not_written(self.folder, error))
        finally:
            if matrices is not None:
                matrices.spool.close()
            shutil.rmtree(self.partial(name), ignore_errors=True)

    def _gather(self, name: str, matrices: Matrices | None) -> None:
        """Put the packed matrices beside the other files."""
        folder = self.partial(name) / name
        if matrices is None:
            return
        keys, expected = matrices.spool.keys(), matrices.spool.expected
        if set(keys) != set(expected):
            raise ValueError(f"its matrices are {sorted(keys)}; expected {list(expected)}")
        for key in keys:
            packed = matrices.spool.packed(key)
            if key[0] != "z":
                packed.rename(folder / f"{key[0]}_{name}_model_{matrices.ranks[key[1]]}.npz")
            elif matrices.s is not None:
                append(packed, "s", matrices.s)
                packed.rename(folder / f"embeddings_{name}.npz")

    def discard(self, name: str) -> None:
        """Give up a prediction that is not complete."""
        spool = self._spools.pop(name, None)
        if spool is not None:
            spool.close()
        shutil.rmtree(self.partial(name), ignore_errors=True)

    def finished(self) -> list[str]:
        """Take the predictions finished since the last call."""
        return [self._finished.popleft() for _ in range(len(self._finished))]

    def finish(self, seconds: float | None = None) -> None:
        """Wait until every complete prediction is on disk or has failed.

        Args:
            seconds: after which to give up; what is left is then stored without compression,
                which is faster. None: as long as it takes.
        """
        if seconds is not None:
            self._hurry.set()
        _, left = wait(self._pending, timeout=seconds)
        if left:
            self._abandoned.set()
        for name in list(self._spools):
            self.discard(name)
        self._pending.clear()
        self._packers.close()
        self._finisher.close()


def not_written(folder: Path, error: Exception) -> str:
    """Word the message about a prediction that could not be written.

    Args:
        folder: of the prediction.
        error: what happened.
    """
    if isinstance(error, OSError):
        reason = disk.reason(error)
        return (
            f"it could not be written to {folder} ({reason}): free the disk or pass another "
            "--out_dir"
        )
    if isinstance(error, Unsafe):
        return str(error)
    return f"it could not be written to {folder} ({type(error).__name__}: {error})"


def replace(source: Path, target: Path, drop: str = "") -> None:
    """Give a complete folder its final name, on disk, in the place of one that is there.

    Files that only the old folder has stay, as they do when Boltz writes into it.

    Args:
        source: the complete folder; on the same file system.
        target: its final name.
        drop: name of a file that follows from the old prediction and must not stay.
    """
    if target.is_symlink():  # what it leads to is not of these results
        target.unlink()
    for path in source.iterdir():
        sync_path(path)
    if target.is_dir():
        kept = [p for p in target.iterdir() if p.name != drop and not (source / p.name).exists()]
        folders = [path.name for path in kept if path.is_dir()]
        # The old folder is moved away first: between the two renames the prediction is missing,
        # which has it folded again, and never half old and half new.
        old = source.with_name(f"{source.name}_replaced")
        for path in kept:
            if path.name not in folders:
                _link(path, source / path.name)
        sync_path(source)
        target.rename(old)
        source.rename(target)
        for name in folders:
            (old / name).rename(target / name)
        shutil.rmtree(old, ignore_errors=True)
    else:
        sync_path(source)
        source.rename(target)
    sync_path(target.parent)


def _link(path: Path, other: Path) -> None:
    try:
        os.link(path, other)
    except OSError:  # not every file system has links
        shutil.copy2(path, other)


def move_into(source: Path, target: Path) -> None:
    """Put complete files into a folder that has others, each in one step and on disk.

    Args:
        source: folder with the complete files.
        target: folder that receives them.

    Raises:
        Unsafe: the folder is a link that leads elsewhere.
    """
    inside(target).mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        sync_path(path)
        os.replace(path, target / path.name)
    sync_path(target)
