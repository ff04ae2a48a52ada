"""Where this process stands among the ranks, and how more of them are started."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import NoReturn

from foldcp.config import Config
from foldcp.report import UserError

SUPPORTED = "2.2."  # versions of boltz
_SLURM_PORT = 20000  # first of 20000 ports that job numbers are spread over


@dataclass(frozen=True)
class Place:
    """One process among those that the launcher started.

    Args:
        rank: 0 to world - 1. world: number of ranks. local_rank: position on its machine.
        launcher: "none", "torchrun" or "srun".
        host, port: where rank 0 (or torchrun's agent, if `agent_store`) serves the store.
        prefix: of this run's keys in the store.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    launcher: str = "none"
    host: str = "127.0.0.1"
    port: int = 0
    agent_store: bool = False
    prefix: str = "foldcp"

    @classmethod
    def find(cls, environ: Mapping[str, str]) -> Place:
        """Read the variables of torchrun or, without them, of Slurm's srun.

        Args:
            environ: usually `os.environ`.

        Raises:
            UserError: the launcher's variables are incomplete or not numbers.
        """
        try:
            if "RANK" in environ and "WORLD_SIZE" in environ:
                return cls._of_torchrun(environ)
            if "SLURM_PROCID" in environ and "SLURM_NTASKS" in environ and _in_step(environ):
                return cls._of_srun(environ)
        except (KeyError, ValueError) as error:
            raise UserError(
                f"the launcher's environment variables cannot be used ({error}): start with "
                "`foldcp run --nproc N predict ...`, torchrun or srun, or unset RANK and WORLD_SIZE"
            ) from error
        return cls()

    @classmethod
    def _of_torchrun(cls, environ: Mapping[str, str]) -> Place:
        world = int(environ["WORLD_SIZE"])
        if world == 1:
            return cls(launcher="torchrun")
        return cls(
            rank=int(environ["RANK"]),
            world=world,
            local_rank=int(environ.get("LOCAL_RANK", environ["RANK"])),
            launcher="torchrun",
            host=environ["MASTER_ADDR"],
            port=int(environ["MASTER_PORT"]),
            agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            prefix=f"foldcp/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}",
        )

    @classmethod
    def _of_srun(cls, environ: Mapping[str, str]) -> Place:
        world = int(environ.get("SLURM_STEP_NUM_TASKS", environ["SLURM_NTASKS"]))
        if world == 1:
            return cls(launcher="srun")
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST")
        nodes = nodes or environ["SLURM_JOB_NODELIST"]
        job = int(environ.get("SLURM_JOB_ID", "0")) * 7 + int(environ.get("SLURM_STEP_ID", "0"))
        return cls(
            rank=int(environ["SLURM_PROCID"]),
            world=world,
            local_rank=int(environ["SLURM_LOCALID"]),
            launcher="srun",
            host=environ.get("MASTER_ADDR")
            or ("127.0.0.1" if on_one_machine(environ) else first_host(nodes)),
            port=int(environ.get("MASTER_PORT") or _SLURM_PORT + job % 20000),
        )


def _in_step(environ: Mapping[str, str]) -> bool:
    # The batch script itself carries SLURM_PROCID=0 and the job's SLURM_NTASKS, yet is alone.
    return "SLURM_STEP_ID" in environ or environ.get("ENVIRONMENT") != "BATCH"


def on_one_machine(environ: Mapping[str, str]) -> bool:
    """True when a launcher's variables say that all its ranks are on this machine."""
    if "WORLD_SIZE" in environ:
        return environ.get("LOCAL_WORLD_SIZE") == environ["WORLD_SIZE"]
    return (environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_NNODES")) == "1"


def first_host(nodelist: str) -> str:
    """First host of a Slurm node list, for example "gpu03" of "gpu[03-07,9],login1".

    Raises:
        ValueError: `nodelist` names no host.
    """
    match = re.match(r"([^\[,\s]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodelist.strip())
    if match is None:
        raise ValueError(f"SLURM_NODELIST {nodelist!r} names no host")
    return "".join(part or "" for part in match.groups())


def resolve_processes(wanted: int | str, arguments: Sequence[str]) -> int:
    """Number of processes to start on this machine.

    Args:
        wanted: a count, or "auto" for one per visible GPU.
        arguments: Boltz's arguments; with `--accelerator cpu` "auto" is one process.

    Returns:
        At least 1. "auto" without a GPU is 1 and says so on stderr.
    """
    if wanted != "auto":
        return int(wanted)
    import torch

    on_cpu = "--accelerator=cpu" in arguments or (
        "--accelerator" in arguments[:-1] and "cpu" in arguments
    )
    count = 0 if on_cpu else torch.cuda.device_count()
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
        config, place = Config.from_env(os.environ), Place.find(os.environ)
        if config.nproc is None or place.launcher == "torchrun" or place.world > 1:
            return
        nproc = resolve_processes(config.nproc, arguments)
    except (ValueError, UserError):
        return  # told once all ranks can agree on who tells it
    if nproc > 1:
        command = [sys.executable, "-m", "foldcp", "run", "--nproc", str(nproc), *arguments]
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, command)


def predicts(arguments: Sequence[str]) -> bool:
    """True when these arguments of `boltz` make a prediction."""
    return arguments[:1] == ["predict"] and not {"--help"} & set(arguments)


def run_ranks(nproc: int, arguments: Sequence[str]) -> int:
    """Run `boltz` with these arguments on several ranks of this machine under torch's launcher.

    Args:
        nproc: number of ranks.
        arguments: what follows `boltz` on the command line.

    Returns:
        Exit code: 0 when every rank succeeded, else that of the first that did not.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.distributed import run as launcher
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        from foldcp.boltz.loopback import stay_on_this_machine
    # The rank that failed has already said why; the agent's account of it would bury that.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    worker = ["-m", "foldcp", "boltz", *arguments]
    own = ["--nnodes", "1", "--nproc-per-node", str(nproc), "--max-restarts", "0"]
    own += stay_on_this_machine(os.environ)
    try:
        launcher.run(launcher.parse_args([*own, *worker]))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if 0 < code < 256 else 1
    except SignalException as error:  # it has passed the signal on, and waited for the ranks
        return 128 + error.sigval
    except KeyboardInterrupt:
        return 130
    return 0


def check_version(ends_process: bool) -> None:
    """Refuse versions of Boltz that the switch was not made for.

    Args:
        ends_process: end all ranks instead of raising.

    Raises:
        ImportError: the installed version is not supported.
    """
    version = metadata.version("boltz")
    if version.startswith(SUPPORTED):
        return
    message = (
        f"boltz {version} is not supported, this foldcp expects boltz {SUPPORTED}x: "
        "`pip install 'boltz>=2.2,<2.3'`, or unset FOLDCP to run Boltz without it"
    )
    if not ends_process:
        raise ImportError(message)
    from foldcp.boltz import session

    session.end(message)


def report_missing_boltz() -> NoReturn:
    """End this process because its Python has no Boltz."""
    from foldcp.boltz import session

    session.end(
        f"boltz is not installed for {sys.executable}, the Python that runs this rank (torchrun "
        "uses its own Python, whatever the boltz script says): activate the environment that has "
        "boltz and start `python -m torch.distributed.run --nproc-per-node N -m boltz.main ...`, "
        "or install it with `pip install 'foldcp[boltz]'`"
    )
