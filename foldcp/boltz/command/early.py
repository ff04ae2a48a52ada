"""Refusals within a second: what is wrong with a command before Boltz and torch are imported.

The same is checked again when the run begins, for those who begin one in another way.
"""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from foldcp.boltz.command.options import check_devices, check_numbers, results_folder
from foldcp.config import Config
from foldcp.errors import UserError
from foldcp.layout import mesh_shape
from foldcp.runtime.files.names import Unsafe, regular
from foldcp.runtime.place import Place

_INPUTS = (".fa", ".fas", ".fasta", ".yml", ".yaml")


def refuse(arguments: Sequence[str], source: Path, environ: Mapping[str, str]) -> None:
    """End this process, and with it all ranks, where a command cannot work.

    Args:
        arguments: what follows `boltz`.
        source: of `boltz.main`.
        environ: usually `os.environ`.
    """
    import click

    from foldcp.boltz.command import declared

    try:
        place = Place.find(environ)
    except UserError:
        return  # told by the road that joins the ranks
    try:
        config = Config.from_env(environ)
        command = declared.command(source)
        if command is not None:
            options = declared.options(command, list(arguments[1:]))
            check(options, config, place)
    except click.exceptions.Exit:
        return  # asked for help
    except click.ClickException as error:
        message = f"{error.format_message()} (see `boltz predict --help`)"
        _end(place, message, error.exit_code)
    except (UserError, ValueError) as error:
        _end(place, str(error), 1)


def check(options: dict[str, Any], config: Config, place: Place) -> None:
    """Check what can be checked without importing anything.

    Args:
        options: of `boltz predict`.
        config: of this run.
        place: of this process.

    Raises:
        UserError, ValueError: say what is wrong and what to do.
    """
    check_numbers(options)
    check_devices(options)
    ranks = place.world
    if ranks == 1 and isinstance(config.nproc, int):
        ranks = config.nproc
    if ranks > 1 or config.nproc != "auto":
        mesh_shape.choose(mesh_shape.group_size(ranks, config.dp, config.mesh), config.mesh)
    check_inputs(Path(options["data"]).expanduser())
    check_kept(config, place.rank == 0)
    if place.rank == 0:
        check_writable("--out_dir", results_folder(options))
        cache = Path(options["cache"]).expanduser()
        if not cache.is_dir():  # one that is complete need not be written
            check_writable("--cache", cache)


def check_inputs(data: Path) -> None:
    """Refuse a folder that holds anything but inputs, as Boltz does, or none.

    Raises:
        UserError: names what is no input.
    """
    found = sorted(data.iterdir()) if data.is_dir() else [data]
    if not found:
        raise UserError("there is no input: give a .yaml or .fasta file, or a folder of them")
    for path in found:
        if path.is_dir():
            raise UserError(f"{path} is a folder among the inputs: move it elsewhere")
        if path.suffix.lower() not in _INPUTS:
            raise UserError(
                f"{path} is no input: inputs are .yaml and .fasta files, move others elsewhere"
            )


def check_writable(option: str, folder: Path) -> None:
    """Refuse a folder that cannot be made or written.

    Args:
        option: names it.
        folder: need not exist.

    Raises:
        UserError: says which option to change.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    code = 0 if os.access(there, os.W_OK | os.X_OK) else errno.EACCES
    if not there.is_dir():
        code = errno.ENOTDIR
    if code:
        raise not_writable(option, folder, os.strerror(code))


def not_writable(option: str, folder: Path, why: str) -> UserError:
    """Word the error about a folder that an option names and that cannot be written.

    Args:
        option: name of the option.
        folder: its value.
        why: the reason, in the system's words.
    """
    return UserError(
        f"{option} folder {folder} cannot be written ({why}): "
        f"pass {option} with a folder that you may write to"
    )


def check_kept(config: Config, is_root: bool) -> None:
    """Try FOLDCP_RESUME on every rank and FOLDCP_REPORT on the root rank.

    Args:
        config: of this run.
        is_root: this is the root rank.

    Raises:
        UserError: nothing can be written there.
    """
    name, path = "FOLDCP_RESUME", config.resume
    try:
        if path is not None:
            folder = Path(path).expanduser()
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        name, path = "FOLDCP_REPORT", config.report if is_root else None
        if path is not None:
            if Path(path).is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            regular(Path(path))  # it would be replaced, /dev/null too
            with tempfile.TemporaryFile(dir=Path(path).parent):
                pass
    except Unsafe as error:
        raise UserError(f"{name}: {error}: name a file that may be replaced") from error
    except OSError as error:
        what = {"FOLDCP_RESUME": "a folder", "FOLDCP_REPORT": "a file in a folder that exists and"}
        raise UserError(
            f"{name}={path} cannot be written ({error.strerror}): "
            f"name {what[name]} that you may write to"
        ) from error


def _end(place: Place, message: str, code: int) -> NoReturn:
    if place.world == 1:
        print(f"foldcp: {message}", file=sys.stderr, flush=True)
        sys.exit(code)
    from foldcp.runtime import session

    session.start(place)  # the others may be on their way still
    session.end(message, code)
