"""Refusals within a second: what is wrong with a command before Boltz and torch are imported.

The same is checked again when the run begins, for those who begin one in another way.
"""

from __future__ import annotations

import ctypes
import difflib
import errno
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from foldcp.boltz.command.formats import check_formats
from foldcp.boltz.command.options import check_devices, check_numbers, results_folder
from foldcp.config import Config
from foldcp.errors import UserError, is_command, with_ranks
from foldcp.layout import mesh_shape
from foldcp.runtime.files import names
from foldcp.runtime.files.names import Unsafe, regular
from foldcp.runtime.place import Place

if TYPE_CHECKING:
    import click

NO_GPU = "--accelerator gpu, but no GPU is visible here: pass --accelerator cpu"
_INPUTS = (".fa", ".fas", ".fasta", ".yml", ".yaml")
_OURS = {"--nproc": "FOLDCP_NPROC", "--mesh": "FOLDCP_MESH"}  # options of `foldcp predict`


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
    except UserError as error:  # no rank can be met
        if "--help" in arguments:
            return
        sys.exit(f"foldcp: {error}")
    try:
        config = Config.from_env(environ)
        command = declared.command(source)
        if command is not None:
            options = declared.options(command, list(arguments[1:]))
            check(options, config, place)
    except click.exceptions.Exit:
        return  # asked for help
    except click.exceptions.NoSuchOption as error:
        _end(place, _no_option(error), error.exit_code)
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
    check_launch(config, place)
    ranks = place.world
    if ranks == 1 and isinstance(config.nproc, int):
        ranks = config.nproc
    if ranks > 1 or config.nproc != "auto":
        ranks = mesh_shape.group_size(ranks, config.dp, config.mesh)
        mesh_shape.choose(ranks, config.mesh)
    check_together(options, config, ranks)
    if options["accelerator"] == "gpu" and no_gpu(os.environ):
        raise UserError(NO_GPU)
    check_inputs(Path(options["data"]).expanduser())
    check_resume_and_report(config, place.rank == 0)
    if place.rank == 0:
        check_writable("--out_dir", results_folder(options))
        cache = Path(options["cache"]).expanduser()
        if not cache.is_dir():  # one that is complete need not be written
            check_writable("--cache", cache)


def _no_option(error: click.exceptions.NoSuchOption) -> str:
    """Say what to do about an option that `boltz predict` does not have."""
    name = error.option_name
    for own in difflib.get_close_matches(name, _OURS, 1, 0.8):
        return (
            f"boltz predict has no option {name}: type `foldcp predict ... {own} VALUE`, or set "
            f"{_OURS[own]}"
        )
    return f"{error.format_message()} (see `boltz predict --help`)"


def check_inputs(data: Path) -> None:
    """Refuse a folder that holds anything but inputs, as Boltz does, or none.

    Raises:
        UserError: names what is no input.
    """
    found = sorted(data.iterdir()) if data.is_dir() else [data]
    for path in found:
        if path.is_dir():
            raise UserError(f"{path} is a folder among the inputs: move it elsewhere")
        if path.suffix.lower() not in _INPUTS:
            raise UserError(
                f"{path} is not an input: inputs are .yaml and .fasta files, move others elsewhere"
            )
    check_names(found)


def check_names(data: Sequence[Path]) -> None:
    """Refuse inputs that are no files or cannot lend results their name, and a folder without any.

    Raises:
        UserError: names the files.
    """
    if not data:
        raise UserError("there is no input: give a .yaml or .fasta file, or a folder of them")
    seen: dict[str, Path] = {}
    for path in data:
        try:
            names.check(path.stem, f"{path.name}: the input's name", names.LONGEST)
            regular(path)
        except Unsafe as error:
            raise UserError(f"{error}: rename or remove it") from error
        other = seen.setdefault(path.stem, path)
        if other is not path:
            raise UserError(
                f"{other.name} and {path.name} would both be called {path.stem}: rename one of them"
            )


def check_launch(config: Config, place: Place) -> None:
    """Compare the number of ranks with FOLDCP_NPROC.

    Args:
        config: of this run.
        place: this process among the ranks.

    Raises:
        UserError: they differ.
    """
    if config.nproc not in (None, 1) and place.world == 1 and not is_command():
        number = "gpu" if config.nproc == "auto" else config.nproc
        raise UserError(
            f"FOLDCP_NPROC={config.nproc} starts ranks of `boltz predict`, not of a program: unset "
            f"it, and start this with {with_ranks(number)}"
        )
    if isinstance(config.nproc, int) and place.world > 1 and config.nproc != place.world:
        raise UserError(
            f"FOLDCP_NPROC is {config.nproc} but {place.launcher} started {place.world} ranks: "
            f"unset FOLDCP_NPROC, or start {config.nproc} ranks"
        )


def check_together(options: dict[str, Any], config: Config, ranks: int) -> None:
    """Refuse variables that cannot be combined with each other, with options or with the device.

    Args:
        options: the arguments of Boltz's `predict`.
        config: of this run.
        ranks: of a mesh.

    Raises:
        UserError: names both.
    """
    on_cpu, kernels = options.get("accelerator") == "cpu", config.kernels
    fused = kernels in ("triton", "cuequivariance")
    if fused and on_cpu:
        raise UserError(f"FOLDCP_KERNELS={kernels} needs a GPU, but this run is on cpu: use auto")
    if fused and options.get("no_kernels"):
        raise UserError(f"--no_kernels contradicts FOLDCP_KERNELS={kernels}: drop one of them")
    if config.graphs == "1" and (on_cpu or ranks > 1):
        why = "this run is on cpu" if ranks == 1 else f"{ranks} ranks exchange tiles in it"
        raise UserError(
            f"FOLDCP_GRAPHS=1 records sampling steps as a CUDA graph, but {why}: use "
            "FOLDCP_GRAPHS=auto"
        )
    check_formats(options, config)


def no_gpu(environ: Mapping[str, str]) -> bool:
    """True where certainly no GPU is visible, without torch; False where torch has to look."""
    hidden = environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return True
    if Path("/dev/kfd").exists():  # of AMD
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return True
    return False


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


def check_resume_and_report(config: Config, is_root: bool) -> None:
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
        name, path = "FOLDCP_REPORT", config.report_path if is_root else None
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
