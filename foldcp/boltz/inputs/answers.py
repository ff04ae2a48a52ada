"""Answers of an MSA server: kept whole, and unpacked without leaving their folder.

An answer is an archive; it may come from a server that the user named, or from a results folder.
"""

from __future__ import annotations

import glob
import shutil
import tarfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path, PurePosixPath
from typing import Any

from boltz.data.msa import mmseqs2

from foldcp.boltz.run import current
from foldcp.runtime.files.names import Unsafe, check, inside, regular


def keeping(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Ask the MSA server, and keep each complete answer for a later run.

    Stock keeps the folder of a download in which it was interrupted, and fails on it for ever.
    """

    @wraps(stock)
    def run_mmseqs2(x: Any, prefix: Path, *args: Any, **options: Any) -> Any:
        run = current()
        folder = None if run is None else run.alignments.answers
        if folder is None:
            return stock(x, prefix, *args, **options)
        prefix = Path(prefix)
        check(prefix.name, "the alignment's name")
        mode = f"pair{options['pairing_strategy']}-env" if options["use_pairing"] else "env"
        known = folder / f"{prefix.name}_{mode}"
        if known.exists() or known.is_symlink():
            try:
                _check_kept(known)
                return stock(x, folder / prefix.name, *args, **options)
            except Exception:  # it was kept by stock, is of other sequences, or is not what we kept
                _remove(known)
        found = stock(x, prefix, *args, **options)
        for path in prefix.parent.glob(f"{glob.escape(prefix.name)}_*"):
            path.rename(folder / path.name)
        return found

    return run_mmseqs2


def _check_kept(known: Path) -> None:
    for path in [inside(known), *known.iterdir()]:
        inside(path)
        if path is not known:
            regular(path)


def _remove(known: Path) -> None:
    if known.is_dir() and not known.is_symlink():
        shutil.rmtree(known)
    else:
        known.unlink()


class _Archive:
    """An answer as `tarfile.open` returns it, of which only files are unpacked."""

    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive

    def __enter__(self) -> _Archive:
        return self

    def __exit__(self, *_: Any) -> None:
        self._archive.close()

    def extractall(self, path: str) -> None:
        """Unpack the files into a folder.

        Raises:
            Unsafe: the archive holds anything else, or a name that leads out of the folder.
        """
        for member in self._archive:
            parts = [part for part in PurePosixPath(member.name).parts if part != "."]
            if member.isdir() and not parts:
                continue
            if len(parts) != 1 or not member.isfile():
                raise Unsafe(
                    f"the MSA server's answer is not used: it holds {member.name!r}, which is no "
                    "file of its own folder"
                )
            target = Path(path) / check(parts[0], "the name in the MSA server's answer")
            source = self._archive.extractfile(member)
            assert source is not None
            target.unlink(missing_ok=True)
            with source, target.open("xb") as file:
                shutil.copyfileobj(source, file)


class _Tarfile:
    """Stands for the module `tarfile` where Boltz unpacks an answer."""

    def __getattr__(self, name: str) -> Any:
        return getattr(tarfile, name)

    @staticmethod
    def open(*args: Any, **options: Any) -> Any:
        archive = tarfile.open(*args, **options)  # noqa: SIM115
        return archive if current() is None else _Archive(archive)


def install() -> None:
    """Unpack answers safely during a prediction."""
    mmseqs2.tarfile = _Tarfile()
