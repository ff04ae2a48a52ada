"""Boltz's command line on several ranks: one message and one exit code whatever goes wrong."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NoReturn

import click

from foldcp.boltz import session
from foldcp.boltz.launch import Place, predicts
from foldcp.config import Config
from foldcp.report import UserError


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
            session.start(Place.find(os.environ), _meeting_time())
            stock(arguments, prog_name or "boltz", complete_var, standalone_mode=False, **extra)
        except BaseException as error:
            _end(error)
        session.leave()

    return main


def _meeting_time() -> float:
    """Seconds for all ranks to meet; a wrong FOLDCP_TIMEOUT is reported once they have met."""
    try:
        return min(session.MEETING_TIME, Config.from_env(os.environ).timeout)
    except ValueError:
        return session.MEETING_TIME


def _end(error: BaseException) -> NoReturn:
    """End every rank after `error`."""
    if isinstance(error, SystemExit) and error.code in (0, None):
        session.leave()
    if isinstance(error, click.exceptions.Exit):
        session.end(f"boltz ended with exit code {error.exit_code}", error.exit_code)
    if isinstance(error, click.ClickException):
        session.end(f"{error.format_message()} (see `boltz predict --help`)", error.exit_code)
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        session.end("interrupted; finished predictions are kept and skipped by the next run", 130)
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
        session.end(f"the prediction ended early ({error.code})", code)
    if isinstance(error, (UserError, ValueError)) and _is_ours(error):
        session.end(str(error))
    session.end(_account(error))


def _is_ours(error: BaseException) -> bool:
    """True for errors whose text is written for the user: ours and those of Boltz's own command."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1].filename.replace(os.sep, "/") if frames else ""
    ours = ("/boltz/main.py", "/foldcp/config.py", "/foldcp/mesh.py")
    return isinstance(error, UserError) or last.endswith(ours)


def _account(error: BaseException) -> str:
    """An unexpected error, with its traceback, on the rank that met it."""
    rank = Place.find(os.environ).rank
    text = str(error)
    if "closed by peer" in text or "reset by peer" in text:
        return (
            f"rank {rank} lost another rank, which ended without a word (most often it was killed "
            "for lack of memory): start more ranks or free memory, then run the same command again"
        )
    details = "".join(traceback.format_exception(error)).rstrip()
    return (
        f"rank {rank} failed ({type(error).__name__}: {text}), all ranks end; finished predictions "
        f"are kept and skipped by the next run\n{details}"
    )
