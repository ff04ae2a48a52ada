"""Start ranks on this machine, and refuse a Boltz that they cannot run."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import util
from pathlib import Path
from typing import NoReturn

from foldcp.config import Config
from foldcp.errors import UserError, on_disk
from foldcp.runtime.place import ROLE, Place, starts

_ELASTIC = "torch.distributed.elastic"  # loggers of torch's launcher
SUPPORTED = "2.2."  # versions of boltz
STARTER = Path(__file__).parents[1] / "cli" / "starter" / "rank.py"  # begins `foldcp` in each rank


def resolve_processes(wanted: int | str, arguments: Sequence[str]) -> int:
    """Return the number of processes to start on this machine.

    Args:
        wanted: a count, or "auto" for one per visible GPU.
        arguments: Boltz's arguments; with `--accelerator cpu` "auto" is one process.

    Returns:
        At least 1. "auto" without a GPU is 1 and says so on stderr.
    """
    if wanted != "auto":
        return int(wanted)
    on_cpu = "--accelerator=cpu" in arguments or (
        "--accelerator" in arguments[:-1] and "cpu" in arguments
    )
    count = 0
    if not on_cpu:
        import torch

        count = torch.cuda.device_count()
    if count == 0:
        reason = "--accelerator cpu was given" if on_cpu else "no GPU is visible"
        print(
            f"foldcp: auto starts one process because {reason}; give a number to start more",
            file=sys.stderr,
        )
    return max(1, count)


def start_processes_if_asked(arguments: Sequence[str]) -> None:
    """Replace this process by `foldcp run` when FOLDCP_NPROC asks for several processes.

    Does nothing under a launcher, for other commands than `predict`, or for one process.

    Args:
        arguments: what follows `boltz` on the command line.
    """
    if not predicts(arguments):
        return
    try:
        config = Config.from_env(os.environ)
        if config.nproc is None or not starts(os.environ, config.nproc):
            return
        nproc = resolve_processes(config.nproc, arguments)
    except (ValueError, UserError):
        return  # told once all ranks can agree on who tells it
    if nproc > 1:
        command = [sys.executable, str(STARTER), "run", "--nproc", str(nproc), *arguments]
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, command)


def announce(environ: Mapping[str, str]) -> None:
    """Say on rank 0 that ranks of another launcher are at work: importing Boltz takes a while.

    Args:
        environ: usually `os.environ`.
    """
    with suppress(UserError):  # told once the ranks have met
        place = Place.find(environ)
        if place.rank == 0 and place.world > 1 and place.launcher != "foldcp":
            print(f"foldcp: starting, {place.world} ranks ({place.launcher})", flush=True)


def report_interrupt(environ: Mapping[str, str]) -> NoReturn:
    """End this process after Ctrl-C while Boltz is imported; rank 0 says so.

    Args:
        environ: usually `os.environ`.
    """
    rank = 0
    with suppress(UserError):
        rank = Place.find(environ).rank
    if rank == 0:
        print(f"foldcp: interrupted; {on_disk()}", file=sys.stderr, flush=True)
    os._exit(130)  # threads of what is half imported would end with words of their own


def predicts(arguments: Sequence[str]) -> bool:
    """Tell whether these arguments of `boltz` make a prediction."""
    return arguments[:1] == ["predict"] and not {"--help"} & set(arguments)


def run_ranks(nproc: int, arguments: Sequence[str]) -> int:
    """Run `boltz` with these arguments on several ranks of this machine under torch's launcher.

    Args:
        nproc: number of ranks.
        arguments: what follows `boltz` on the command line.

    Returns:
        Exit code: 0 when every rank succeeded, else that of the first that did not.
    """
    print(f"foldcp: starting {nproc} ranks", flush=True)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    for name in [n for n in os.environ if n.startswith("PET_")]:
        del os.environ[name]  # defaults of torchrun's options, of a run over several machines
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.distributed import run as launcher
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        from foldcp.runtime.store.loopback import stay_on_this_machine
    # The rank that failed has already said why; the agent's account of it would bury that.
    for name in [n for n in logging.root.manager.loggerDict if n.startswith(_ELASTIC)]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # torch gives each a level of its own
    logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)  # advice on its options
    worker = [str(STARTER), "boltz", *arguments]
    own = ["--nnodes", "1", "--nproc-per-node", str(nproc), "--max-restarts", "0"]
    own += stay_on_this_machine(os.environ)
    own += ["--role", ROLE]
    parser = launcher.get_args_parser()
    if "--signals-to-handle" in parser.format_help():  # torch 2.9 and newer
        own += ["--signals-to-handle", ",".join(_signals())]
    try:
        launcher.run(parser.parse_args([*own, *worker]))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if 0 < code < 256 else 1
    except SignalException as error:  # it has passed the signal on, and waited for the ranks
        return 128 + error.sigval
    except KeyboardInterrupt:
        return 130
    return 0


def _signals() -> list[str]:
    """Signals that end the launcher and its ranks; one that is ignored, as by nohup, stays so."""
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
    return [n for n in names if signal.getsignal(getattr(signal, n)) != signal.SIG_IGN]


def check_version(ends_process: bool) -> None:
    """Refuse versions of Boltz that the switch was not made for.

    Args:
        ends_process: end all ranks instead of raising.

    Raises:
        ImportError: the installed version is not supported.
    """
    name, version = installed()
    if name == "boltz" and version.startswith(SUPPORTED):
        return
    other = name != "boltz" and version
    first = f"`pip uninstall {name}`, then " if other else ""
    message = (
        f"{name}{version and ' '}{version} is not supported, this foldcp expects boltz "
        f"{SUPPORTED}x: "
        f"{first}`pip install 'boltz>=2.2.1,<2.3'`, or unset FOLDCP to run Boltz without it"
    )
    refuse(message, ends_process)


def refuse(message: str, ends_process: bool) -> NoReturn:
    """Say why Boltz does not run.

    Args:
        message: the reason, and what to do.
        ends_process: end all ranks instead of raising.

    Raises:
        ImportError: with the message.
    """
    if not ends_process:
        raise ImportError(message)
    from foldcp.runtime import session

    session.end(message)


def installed() -> tuple[str, str]:
    """Return name and version of the package that the module `boltz` comes from."""
    from importlib import metadata  # a tenth of a second, which `foldcp --help` does without

    try:
        return "boltz", metadata.version("boltz")
    except metadata.PackageNotFoundError:
        for name in metadata.packages_distributions().get("boltz", ()):
            return name, metadata.version(name)
    return "the module boltz, which belongs to no installed package,", ""


def source_of_boltz() -> Path | None:
    """Find the file of `boltz.main` without importing it; None where it is not found."""
    spec = util.find_spec("boltz")
    folders = (spec and spec.submodule_search_locations) or ()
    return next((path for path in (Path(f) / "main.py" for f in folders) if path.is_file()), None)


def report_missing_boltz() -> NoReturn:
    """End this process because its Python has no Boltz."""
    from foldcp.runtime import session

    session.end(
        f"boltz is not installed for {sys.executable}, the Python that runs this rank (torchrun "
        "uses its own Python, whatever the boltz script says): activate the environment that has "
        "boltz and start `python -m torch.distributed.run --nproc-per-node N -m boltz.main ...`, "
        "or install it with `pip install 'foldcp[boltz]'`"
    )
