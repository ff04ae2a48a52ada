"""Who starts the ranks: a table of environments; and what those do that are left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from foldcp.config import Config
from foldcp.errors import UserError
from foldcp.runtime.place import Place, starts

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n1",
    "MASTER_PORT": "500", "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip
ALONE = {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
OPERATOR = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
KUBEFLOW = {
    "PET_MASTER_ADDR": "job-master-0", "PET_MASTER_PORT": "23456", "PET_NNODES": "2",
    "PET_NODE_RANK": "0", "PET_RDZV_BACKEND": "c10d", "PET_STANDALONE": "1",
}  # fmt: skip
SAGEMAKER = {"SM_HOSTS": '["algo-1","algo-2"]', "SM_CURRENT_HOST": "algo-1", "SM_NUM_GPUS": "8"}
SRUN = {
    "SLURM_JOB_ID": "12", "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_JOB_NAME": "screen.sh", "SLURM_NODELIST": "gpu[03-09]",
}  # fmt: skip
PTY = {**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NAME": "bash"}
BATCH = {
    "SLURM_JOB_ID": "12", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0",
    "ENVIRONMENT": "BATCH", "SLURM_NODELIST": "gpu03", "SLURM_JOB_NAME": "screen.sh",
}  # fmt: skip
SALLOC = {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "8", "SLURM_NODELIST": "gpu03"}
OMPI = {
    "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "prterun-n1-77@1",
}  # fmt: skip
FAR = {**OMPI, "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
MVAPICH = {
    "MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_LOCAL_RANK": "1",
    "MV2_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
PALS = {"PMI_RANK": "1", "PMI_SIZE": "8", "PALS_LOCAL_RANKID": "1", "MASTER_ADDR": "x1"}
JSM = {
    "JSM_NAMESPACE_RANK": "1", "JSM_NAMESPACE_SIZE": "4", "JSM_NAMESPACE_LOCAL_RANK": "1",
    "JSM_NAMESPACE_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "5",
}  # fmt: skip
FLUX = {
    "FLUX_TASK_RANK": "1", "FLUX_JOB_SIZE": "4", "FLUX_TASK_LOCAL_ID": "1", "FLUX_JOB_ID": "f1",
    "FLUX_JOB_NNODES": "1", "PMI_RANK": "1", "PMI_SIZE": "4",
}  # fmt: skip
HOROVOD = {
    "HOROVOD_RANK": "1", "HOROVOD_SIZE": "2", "HOROVOD_LOCAL_RANK": "1", "HOROVOD_LOCAL_SIZE": "2",
}  # fmt: skip
PMI = {"PMI_RANK": "1", "PMI_SIZE": "8", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "8"}
EXPORTED = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "gpu03", "MASTER_PORT": "1234"}
SELF = ("none", 0, 1, 0)  # launcher, rank, world, local rank

# name -> (variables, FOLDCP_NPROC, launcher / rank / world / local rank, foldcp starts ranks)
TABLE = {
    "nothing": ({}, None, SELF, False),
    "nothing, four asked for": ({}, "4", SELF, True),
    "nothing, all GPUs asked for": ({}, "auto", SELF, True),
    "torchrun": (TORCHRUN, None, ("torchrun", 3, 8, 1), False),
    "torchrun, and the same number asked for": (TORCHRUN, "8", ("torchrun", 3, 8, 1), False),
    "torchrun without LOCAL_RANK": (
        {k: v for k, v in TORCHRUN.items() if k != "LOCAL_RANK"}, None, ("torchrun", 3, 8, 0), False
    ),
    "torchrun of foldcp": (
        {**TORCHRUN, "ROLE_NAME": "foldcp"}, "8", ("foldcp", 3, 8, 1), False
    ),
    "torchrun within srun": ({**SRUN, **TORCHRUN}, None, ("torchrun", 3, 8, 1), False),
    "torchrun of one rank": (ALONE, None, ("torchrun", 0, 1, 0), False),
    "shell under a torchrun of one rank": (ALONE, "4", ("torchrun", 0, 1, 0), True),
    "leaked RANK and WORLD_SIZE": ({"RANK": "0", "WORLD_SIZE": "1"}, "4", SELF, True),
    "leaked, all GPUs asked for": ({"RANK": "0", "WORLD_SIZE": "1"}, "auto", SELF, True),
    "leaked, nothing asked for": ({"RANK": "0", "WORLD_SIZE": "1"}, None, SELF, False),
    "RANK alone": ({"RANK": "0"}, "2", SELF, True),
    "WORLD_SIZE alone": ({"WORLD_SIZE": "4"}, "2", SELF, True),
    "image with WORLD_SIZE=1 in srun": (
        {"RANK": "0", "WORLD_SIZE": "1", **SRUN}, None, ("srun", 5, 8, 1), False
    ),
    "job operator, one process a container": (
        OPERATOR, None, ("a job operator", 1, 2, 0), False
    ),
    "by hand on one machine": (
        {**OPERATOR, "MASTER_ADDR": "127.0.0.1"}, None, ("a job operator", 1, 2, 1), False
    ),
    "MASTER_ADDR alone": ({"MASTER_ADDR": "n1", "MASTER_PORT": "1"}, "4", SELF, True),
    "Kubeflow, torchrun's defaults only": (KUBEFLOW, "2", SELF, True),
    "Kubeflow, and its torchrun": (
        {**KUBEFLOW, **TORCHRUN}, None, ("torchrun", 3, 8, 1), False
    ),
    "SageMaker": (SAGEMAKER, "8", SELF, True),
    "SageMaker, nothing asked for": (SAGEMAKER, None, SELF, False),
    "SageMaker's torchrun": ({**SAGEMAKER, **TORCHRUN}, None, ("torchrun", 3, 8, 1), False),
    "srun": (SRUN, None, ("srun", 5, 8, 1), False),
    "srun, old Slurm": (
        {k: v for k, v in SRUN.items() if not k.startswith("SLURM_STEP")}, None,
        ("srun", 5, 8, 1), False,
    ),
    "srun in a batch script": (
        {**BATCH, **SRUN}, None, ("srun", 5, 8, 1), False
    ),
    "srun of one task in a batch script of eight": (
        {**BATCH, "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "1"}, "8", ("srun", 0, 1, 0), True
    ),
    "srun of a shell's command": ({**SRUN, "SLURM_JOB_NAME": "bash"}, None,
                                  ("srun", 5, 8, 1), False),
    "srun with PMI": ({**SRUN, "PMI_RANK": "5", "PMI_SIZE": "8"}, None, ("srun", 5, 8, 1), False),
    "batch script": (BATCH, None, SELF, False),
    "batch script, four asked for": (BATCH, "4", SELF, True),
    "batch step of Slurm 20": ({**BATCH, "SLURM_STEP_ID": "4294967291"}, "4", SELF, True),
    "shell of srun --pty": ({**PTY, "SLURM_PTY_PORT": "1"}, None, SELF, False),
    "shell of srun --pty, four asked for": ({**PTY, "SLURM_PTY_WIN_COL": "80"}, "4", SELF, True),
    "shell of srun --pty in tmux, four asked for": (PTY, "4", SELF, True),
    "login shell of srun --pty": ({**PTY, "SLURM_JOB_NAME": "/bin/zsh"}, "4", SELF, True),
    "shell of srun --pty with PMI": (
        {**PTY, "SLURM_PTY_PORT": "1", "PMI_RANK": "0", "PMI_SIZE": "8"}, "4", SELF, True
    ),
    "salloc": (SALLOC, None, SELF, False),
    "salloc, four asked for": (SALLOC, "4", SELF, True),
    "salloc with an interactive step": (
        {**PTY, "SLURM_STEP_ID": "4294967290", "SLURM_JOB_NAME": "interactive"}, "4", SELF, True
    ),
    "ssh into a node of a job": ({"SLURM_JOB_ID": "12"}, "8", SELF, True),
    "ssh, adopted by the job": ({**BATCH, "SLURM_STEP_ID": "4294967292"}, "8", SELF, True),
    "Open MPI": (OMPI, None, ("mpirun (Open MPI)", 2, 4, 2), False),
    "Open MPI, several machines": (
        {**FAR, "MASTER_ADDR": "n1", "MASTER_PORT": "77"}, None, ("mpirun (Open MPI)", 2, 4, 0),
        False,
    ),
    "Open MPI of one": (
        {k: "1" if k.endswith("SIZE") else "0" for k in OMPI}, "4", SELF, True
    ),
    "Open MPI in a batch script": ({**BATCH, **OMPI}, None, ("mpirun (Open MPI)", 2, 4, 2), False),
    "MVAPICH": (MVAPICH, None, ("mpirun (MVAPICH)", 1, 2, 1), False),
    "MPICH and Intel MPI": (HYDRA, None, ("mpiexec (Hydra)", 1, 2, 1), False),
    "MPICH in a batch script": ({**BATCH, **HYDRA}, None, ("mpiexec (Hydra)", 1, 2, 1), False),
    "Cray PALS": (PALS, None, ("mpiexec (PALS)", 1, 8, 1), False),
    "PMI with local ranks": (PMI, None, ("mpiexec (PMI)", 1, 8, 1), False),
    "PALS with PMI's local size": (
        {**PMI, "PALS_LOCAL_RANKID": "1"}, None, ("mpiexec (PALS)", 1, 8, 1), False
    ),
    "LSF jsrun": (JSM, None, ("jsrun", 1, 4, 1), False),
    "LSF jsrun with Spectrum MPI": (
        {**JSM, **OMPI}, None, ("mpirun (Open MPI)", 2, 4, 2), False
    ),
    "LSF job": ({"LSB_JOBID": "5", "LSB_DJOB_NUMPROC": "4"}, "4", SELF, True),
    "Flux": (FLUX, None, ("flux run", 1, 4, 1), False),
    "Flux of one": (
        {**FLUX, "FLUX_TASK_RANK": "0", "FLUX_JOB_SIZE": "1", "PMI_RANK": "0", "PMI_SIZE": "1"},
        "4", SELF, True,
    ),
    "Horovod": (HOROVOD, None, ("horovodrun", 1, 2, 1), False),
    "srun whose script exports RANK": (
        {**SRUN, **EXPORTED}, None, ("a job operator", 5, 8, 1), False
    ),
    "mpirun whose script exports RANK": (
        {**OMPI, **EXPORTED, "RANK": "2"}, None, ("a job operator", 2, 8, 2), False
    ),
    "RANK and WORLD_SIZE of a template": ({"RANK": "", "WORLD_SIZE": ""}, "2", SELF, True),
    "PMI of one": ({"PMI_RANK": "0", "PMI_SIZE": "1"}, "2", SELF, True),
}  # fmt: skip


@pytest.fixture(autouse=True)
def command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages are for who typed `boltz`, not for a program."""
    monkeypatch.setattr(sys, "argv", ["boltz", "predict", "x.yaml"])


@pytest.mark.parametrize("name", TABLE)
def test_who_starts_the_ranks(name: str) -> None:
    variables, nproc, expected, ours = TABLE[name]
    environ = {**variables, **({"FOLDCP_NPROC": nproc} if nproc else {})}
    place = Place.find(environ)
    assert (place.launcher, place.rank, place.world, place.local_rank) == expected
    assert starts(environ, Config.from_env(environ).nproc) == ours
    if place.world > 1:
        assert place.host and place.port > 0
        # The remedy names variables that are set, and works: without them nobody waits.
        unset = place.at().partition("`env ")[2].partition(" foldcp run")[0].split()[1::2]
        assert unset and set(unset) <= set(environ)
        left = {k: v for k, v in environ.items() if k not in unset}
        assert Place.find({**left, "FOLDCP_NPROC": "4"}).world == 1


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is missing"),
        ({**TORCHRUN, "RANK": "x"}, "RANK is 'x', not a number"),
        ({**TORCHRUN, "RANK": "8"}, "name rank 8 of 8: RANK=8, WORLD_SIZE=8"),
        ({**SRUN, "SLURM_PROCID": "9"}, "name rank 9 of 8: SLURM_PROCID=9"),
        ({**TORCHRUN, "RANK": 5000 * "9"}, "RANK is '9{40}', not a number"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "MASTER_PORT is 70000, not a port"),
        ({**SRUN, "MASTER_PORT": "abc"}, "MASTER_PORT is 'abc', not a number"),
        ({**TORCHRUN, "MASTER_ADDR": ""}, "MASTER_ADDR is empty"),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "-2"}, "SLURM_STEP_NUM_TASKS is '-2', not a number"),
        (FAR, "MASTER_ADDR does not name that of rank 0"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "MPI_LOCALRANKID is missing"),
    ],
)
def test_unusable_variables_are_named(variables: dict[str, str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Place.find(variables)


@pytest.mark.process
def test_a_rank_that_is_alone_says_for_whom_it_waits(tmp_path: Path) -> None:
    """As in the shell of `srun --ntasks=4 --pty`, where nothing starts the other ranks."""
    code = (
        "import os, sys\n"
        "sys.argv = ['boltz', 'predict']\n"
        "from foldcp.runtime import session; from foldcp.runtime.store import meetings\n"
        "from foldcp.runtime.place import Place\n"
        "meetings._PATIENT = 0.5\n"
        "session.start(Place.find(os.environ), 4.0).gather(None)\n"
    )
    shared = {**os.environ, **SRUN, "SLURM_STEP_NUM_TASKS": "3", "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": "29871", "SLURM_LOCALID": "0"}  # fmt: skip
    ranks = [
        subprocess.Popen([sys.executable, "-c", code], env={**shared, "SLURM_PROCID": str(rank)},
                         stderr=subprocess.PIPE, text=True, cwd=tmp_path)
        for rank in (0, 2)
    ]  # fmt: skip
    try:
        assert ranks[0].stderr is not None
        told = ranks[0].stderr.readline()
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert told.startswith("foldcp: waiting for rank 1 at 127.0.0.1:29871: srun says that there")
    assert "are 3 ranks (SLURM_PROCID=0, SLURM_STEP_NUM_TASKS=3, SLURM_STEP_ID=0)" in told
    assert "env -u SLURM_PROCID foldcp run --nproc 3 predict" in told
