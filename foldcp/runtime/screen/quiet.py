"""Keep the screen to one voice while a run works, and all output in `foldcp.log`.

Boltz, Lightning and other packages announce, warn and print tracebacks of inputs that are then
skipped. On rank 0 this goes to the log, with what foldcp says; other ranks are silent.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TextIO

from foldcp.runtime.files.names import Unsafe, inside
from foldcp.runtime.screen.console import Console, Log, Screened, is_news

NAME = "foldcp.log"
_LOGGERS = ("pytorch_lightning", "lightning_fabric", "lightning", "lightning.pytorch")
_EXPECTED = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)


@contextmanager
def silent() -> Iterator[None]:
    """Say nothing on a rank that is not 0; errors still reach stderr."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


@contextmanager
def one_voice(folder: Path, verbose: bool) -> Iterator[Console]:
    """Screen what is printed in this process, and keep all of it.

    Args:
        folder: of the results.
        verbose: show all of it as well (FOLDCP_VERBOSE).

    Yields:
        Where to show the progress of the run.
    """
    log = Log(_place(folder))
    log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(sys.argv)}")
    screen = sys.stderr if sys.stderr.isatty() else sys.stdout
    console = Console(screen, log)
    shown = (lambda line: True) if verbose else is_news
    out, err = (Screened(stream, console, shown) for stream in (sys.stdout, sys.stderr))
    with ExitStack() as until_end:
        until_end.callback(log.close)
        for context in (redirect_stdout(out), redirect_stderr(err)):
            until_end.enter_context(context)
        for kept in () if verbose else (_loggers, _warnings, _tracebacks):
            until_end.enter_context(kept(log))
        try:
            yield console
        finally:
            console.clear()
            with suppress(OSError, ValueError):
                out.flush()
                err.flush()


def _place(folder: Path) -> Path | None:
    """The log's path; None where it would lead out of the folder."""
    try:
        return inside(folder / NAME, folder)
    except Unsafe:
        return None


@contextmanager
def _loggers(log: Log) -> Iterator[None]:
    """Send what Lightning announces to the log."""

    def write(text: str) -> None:
        if text.strip():
            log.write(text.strip())

    stream = SimpleNamespace(write=write, flush=lambda: None)
    before = []
    for logger in map(logging.getLogger, _LOGGERS):
        before.append((logger, logger.handlers, logger.propagate))
        logger.handlers, logger.propagate = [logging.StreamHandler(stream)], False
    try:
        yield
    finally:
        for logger, handlers, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate


@contextmanager
def _warnings(log: Log) -> Iterator[None]:
    """Send to the log what packages warn each other of, and what Lightning warns of."""
    with warnings.catch_warnings():
        stock = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, _EXPECTED) or "lightning" in filename:
                log.write(warnings.formatwarning(message, category, filename, lineno, line).strip())
            else:
                stock(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


@contextmanager
def _tracebacks(log: Log) -> Iterator[None]:
    """Send the tracebacks of inputs that Boltz skips to the log; foldcp says why in a line."""

    stock = traceback.print_exc
    traceback.print_exc = lambda *_, **__: log.write(traceback.format_exc().rstrip())
    try:
        yield
    finally:
        traceback.print_exc = stock
