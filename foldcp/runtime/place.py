"""Find out from variables how the ranks were started, and which one this process is.

A pure function of the environment: `Place.find` reads what launchers leave there and `starts` says
whether foldcp starts ranks itself. A variable that says "one rank" is no launcher, for such
variables leak: out of shells, containers and the operators of a cluster.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from foldcp.errors import UserError, with_ranks
from foldcp.runtime.slurm import first_host, in_step

ROLE = "foldcp"  # of ranks that foldcp starts by torch's launcher
_PORT = 20000  # first of 20000 ports that jobs are spread over
_LOOPBACK = ("127.0.0.1", "localhost", "::1")

# Rank, size, rank on the machine, ranks on the machine, what names the job: of other launchers.
_MPI = {
    "mpirun (Open MPI)": (
        "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE", ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    ),
    "mpirun (MVAPICH)": (
        "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE", ("PMI_ID", "MPIRUN_ID"),
    ),
    "mpiexec (PALS)": (
        "PMI_RANK", "PMI_SIZE", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE", ("PALS_APID",),
    ),
    "mpiexec (Hydra)": (
        "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", ("PMI_JOBID", "PMI_PORT"),
    ),
    "mpiexec (PMI)": (
        "PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE", ("PMI_JOBID", "PMI_PORT"),
    ),
    "jsrun": (
        "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK",
        "JSM_NAMESPACE_LOCAL_SIZE", ("PMIX_NAMESPACE", "LSB_JOBID"),
    ),
    "flux run": (
        "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", "FLUX_TASKS", ("FLUX_JOB_ID",),
    ),
    "horovodrun": (
        "HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE",
        ("HOROVOD_GLOO_RENDEZVOUS_PORT",),
    ),
}  # fmt: skip
_RANKS = ("RANK", "SLURM_PROCID", *dict.fromkeys(names[0] for names in _MPI.values()))


@dataclass(frozen=True)
class Place:
    """One process among those that the launcher started.

    Args:
        rank: 0 to world - 1.
        world: number of ranks.
        local_rank: position on its machine.
        launcher: "none", "foldcp", "torchrun", "a job operator", "srun", or a name of `_MPI`.
        host: machine where rank 0 (or torchrun's agent, if `agent_store`) serves the store.
        port: port of the store there.
        agent_store: torchrun's agent serves it.
        prefix: of this run's keys in the store.
        told_by: the variables that say so, for messages.
        unset: those without which this process would be alone.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    launcher: str = "none"
    host: str = "127.0.0.1"
    port: int = 0
    agent_store: bool = False
    prefix: str = "foldcp"
    told_by: str = field(default="", compare=False)
    unset: tuple[str, ...] = field(default=(), compare=False)

    @property
    def server(self) -> str:
        """Machine and port that serve the store."""
        return "the launcher" if self.agent_store else "rank 0"

    @classmethod
    def find(cls, environ: Mapping[str, str]) -> Place:
        """Read the variables of torchrun or a job operator, else of Slurm's srun, else of MPI.

        Raises:
            UserError: the launcher's variables are incomplete or not numbers.
        """
        try:
            for read in (_of_torchrun, _of_srun, _of_mpi):
                place = read(environ)
                if place is not None:
                    if place.rank >= place.world:
                        named = f"rank {place.rank} of {place.world}"
                        raise ValueError(f"they name {named}: {place.told_by}")
                    return replace(place, unset=tuple(x for x in _RANKS if x in environ))
        except (KeyError, ValueError) as error:
            names = " and ".join(x for x in _RANKS if x in environ)
            raise UserError(
                f"the launcher's environment variables cannot be used ({_said(error)}): unset "
                f"{names}, and for several ranks start with {with_ranks('N')}, torchrun or srun"
            ) from error
        return cls()

    def at(self) -> str:
        """Say where and why this rank waits for others, with the remedy, for messages."""
        names = " ".join(f"-u {name}" for name in self.unset)
        return (
            f"at {self.host}:{self.port}: {self.launcher} says that there are {self.world} ranks "
            f"({self.told_by}). If nothing starts them, end this and start ranks yourself: "
            f"{with_ranks(self.world).replace('`', f'`env {names} ', 1)}"
        )


def starts(environ: Mapping[str, str], wanted: int | str | None) -> bool:
    """Tell whether foldcp starts the ranks of this machine itself.

    Args:
        environ: usually `os.environ`.
        wanted: FOLDCP_NPROC, None when it is unset.

    Raises:
        UserError: as of `Place.find`.
    """
    return wanted is not None and Place.find(environ).world == 1


def _said(error: Exception) -> str:
    return f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ[name]
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ValueError(f"{name} is {text[:40]!r}, not a number")
    return int(text)


def _port(environ: Mapping[str, str], job: int | None = None) -> int:
    """MASTER_PORT, else one that a job's ranks agree on."""
    if job is not None and not environ.get("MASTER_PORT"):
        return _PORT + job % 20000
    port = _number(environ, "MASTER_PORT")
    if not 0 < port < 65536:
        raise ValueError(f"MASTER_PORT is {port}, not a port from 1 to 65535")
    return port


def _identity(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else zlib.crc32(text.encode())


def _told(environ: Mapping[str, str], *names: str) -> str:
    return ", ".join(f"{name}={environ[name]}" for name in names if name in environ)


def _of_torchrun(environ: Mapping[str, str]) -> Place | None:
    """torchrun, or an operator that sets RANK and WORLD_SIZE (Kubeflow's PyTorchJob, SageMaker)."""
    if not environ.get("RANK") or not environ.get("WORLD_SIZE"):  # templates leave them empty
        return None
    elastic = any(name.startswith("TORCHELASTIC_") for name in environ)
    rank, world = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    if world <= 1:
        # Without torchrun it may stand in an image, whatever else starts the ranks.
        return Place(launcher="torchrun") if elastic else None
    host = environ["MASTER_ADDR"]
    if not host:
        raise ValueError("MASTER_ADDR is empty")
    return Place(
        rank=rank,
        world=world,
        local_rank=_local_rank(environ, rank, host),
        launcher=_named(environ) if elastic else "a job operator",
        host=host,
        port=_port(environ),
        agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        prefix=f"foldcp/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}",
        told_by=_told(environ, "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    )


def _named(environ: Mapping[str, str]) -> str:
    return "foldcp" if environ.get("ROLE_NAME") == ROLE else "torchrun"


def _local_rank(environ: Mapping[str, str], rank: int, host: str) -> int:
    if "LOCAL_RANK" in environ:
        return _number(environ, "LOCAL_RANK")
    # Scripts make RANK of what the launcher says, and forget its rank on the machine.
    for name, local in ("SLURM_PROCID", "SLURM_LOCALID"), *((x[0], x[2]) for x in _MPI.values()):
        if environ.get(name) == environ["RANK"] and local in environ:
            return _number(environ, local)
    # An operator starts one process in each of its containers; by hand they share a machine.
    return rank if host in _LOOPBACK else 0


def _of_srun(environ: Mapping[str, str]) -> Place | None:
    if "SLURM_PROCID" not in environ or not in_step(environ):
        return None
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    if tasks not in environ:
        return None
    world = _number(environ, tasks)
    if world <= 1:
        return Place(launcher="srun")
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST")
    nodes = nodes or environ["SLURM_JOB_NODELIST"]
    job, step = (_identity(environ.get(f"SLURM_{x}_ID", "0")) for x in ("JOB", "STEP"))
    return Place(
        rank=_number(environ, "SLURM_PROCID"),
        world=world,
        local_rank=_number(environ, "SLURM_LOCALID"),
        launcher="srun",
        host=environ.get("MASTER_ADDR")
        or ("127.0.0.1" if on_one_machine(environ) else first_host(nodes)),
        port=_port(environ, 7 * job + step),
        told_by=_told(environ, "SLURM_PROCID", tasks, "SLURM_STEP_ID"),
    )


def on_one_machine(environ: Mapping[str, str]) -> bool:
    """Tell whether a launcher's variables say that all its ranks are on this machine."""
    if environ.get("WORLD_SIZE", "1") != "1":
        return environ.get("LOCAL_WORLD_SIZE") == environ["WORLD_SIZE"]
    for _, size, _, local_size, _ in _MPI.values():
        if environ.get(size, "1") != "1" and local_size in environ:
            return environ[size] == environ[local_size]
    if "FLUX_TASK_RANK" in environ:
        return environ.get("FLUX_JOB_NNODES") == "1"
    return (environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_NNODES")) == "1"


def _of_mpi(environ: Mapping[str, str]) -> Place | None:
    for launcher, (rank, size, local_rank, _, job) in _MPI.items():
        if rank not in environ or size not in environ:
            continue
        if local_rank not in environ:
            continue  # another launcher's names for the same
        world = _number(environ, size)
        if world <= 1:
            return None
        host = environ.get("MASTER_ADDR")
        if not host and not on_one_machine(environ):
            raise ValueError(
                f"{launcher} started {world} ranks on several machines and MASTER_ADDR does not "
                "name that of rank 0, set it and MASTER_PORT on all ranks"
            )
        named = "".join(environ.get(name, "") for name in job)
        return Place(
            rank=_number(environ, rank),
            world=world,
            local_rank=_number(environ, local_rank),
            launcher=launcher,
            host=host or "127.0.0.1",
            port=_port(environ, zlib.crc32(named.encode())),
            told_by=_told(environ, rank, size, local_rank),
        )
    pmi = "PMI_RANK" in environ and "PMI_SIZE" in environ
    if pmi and "SLURM_PROCID" not in environ and _number(environ, "PMI_SIZE") > 1:
        # One of several, but which GPU is its own? Slurm sets these for shells too.
        raise KeyError("MPI_LOCALRANKID")
    return None
