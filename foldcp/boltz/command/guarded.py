"""Boltz's command line on several ranks: one message and one exit code whatever goes wrong."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NoReturn

import click

from foldcp.config import Config
from foldcp.errors import EXCHANGE, TransportError, UserError, on_disk
from foldcp.runtime import session
from foldcp.runtime.files import disk
from foldcp.runtime.launch import predicts
from foldcp.runtime.place import Place
from foldcp.runtime.recovery import is_broken


def guarded(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the `main` method of Boltz's click group.

    Args:
        stock: the method. Called by a program (`standalone_mode=False`) or for anything but a
            prediction it stays as it is.

    Returns:
        The method that ends the process, every rank of it, with at most one message.
    """

    @wraps(stock)
    def main(
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        arguments = list(sys.argv[1:] if args is None else args)
        if not standalone_mode or not predicts(arguments):
            return stock(arguments, prog_name, complete_var, standalone_mode, **extra)
        try:
            session.start(Place.find(os.environ), meeting_time())
            stock(arguments, prog_name or "boltz", complete_var, standalone_mode=False, **extra)
        except BaseException as error:
            end(error)
        session.leave()

    return main


def meeting_time() -> float:
    """Return the seconds for all ranks to meet; a wrong FOLDCP_TIMEOUT is reported afterwards."""
    try:
        return min(session.MEETING_TIME, Config.from_env(os.environ).timeout)
    except ValueError:
        return session.MEETING_TIME


def end(error: BaseException) -> NoReturn:
    """End every rank after `error`."""
    run = session.current()
    if run is not None and run.interrupted.is_set():  # whatever Lightning makes of Ctrl-C
        session.end(f"interrupted; {on_disk()}", 130)
    if isinstance(error, SystemExit) and error.code in (0, None):
        session.leave()
    if isinstance(error, click.exceptions.Exit):
        session.end(f"boltz ended with exit code {error.exit_code}", error.exit_code)
    if isinstance(error, click.ClickException):
        session.end(f"{error.format_message()} (see `boltz predict --help`)", error.exit_code)
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        session.end(f"interrupted; {on_disk()}", 130)
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
        session.end(f"the prediction ended early ({error.code})", code)
    if isinstance(error, TransportError) and str(error).startswith(EXCHANGE):
        session.end(_account(error))
    if isinstance(error, (RuntimeError, ValueError)) and is_ours(error):
        session.end(str(error))
    refused = disk.refused(error)
    session.end(f"{refused}; {on_disk()}" if refused else _account(error))


def is_ours(error: BaseException) -> bool:
    """Tell whether an error's text is written for the user: ours, and those of Boltz's command."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1].filename.replace(os.sep, "/") if frames else ""
    ours = (
        "/boltz/main.py",
        "/foldcp/config/",
        "/foldcp/fabric/mesh.py",
        "/foldcp/layout/mesh_shape.py",
    )
    return isinstance(error, UserError) or last.endswith(ours)  # main.py: check_inputs and such


def _account(error: BaseException) -> str:
    """An unexpected error, with its traceback, on the rank that met it."""
    rank, run = Place.find(os.environ).rank, session.current()
    peers = None if run is None else run.peers
    where = f" in {run.stage}" if run is not None and run.stage else ""
    if peers is not None and is_broken(error):
        try:
            missing = peers.missing()
        except RuntimeError:
            return peers.lost_store()
        if missing:
            return f"{'; '.join(missing)}; all ranks end; {on_disk()}"
    if isinstance(error, UserError):
        return f"{error} (rank {rank}{where})"
    details = "".join(traceback.format_exception(error)).rstrip()
    return (
        f"rank {rank} failed{where} ({type(error).__name__}: {error}), all ranks end; {on_disk()}\n"
        f"{details}"
    )
