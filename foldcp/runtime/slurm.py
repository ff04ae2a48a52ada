"""Read what Slurm's variables say of this process."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath

from foldcp.config import asks_for_ranks

_SHELLS = ("ash", "bash", "csh", "dash", "fish", "ksh", "sh", "tcsh", "zsh")
# Steps that Slurm itself makes: interactive shell, batch script, adopted processes, pending.
_OWN_STEPS = ("4294967290", "4294967291", "4294967292", "4294967293")


def in_step(environ: Mapping[str, str]) -> bool:
    """Tell whether srun started this process as one of its tasks.

    The shell of `srun --pty` is no such task: what is typed there is one process. Where the
    variables of its terminal are lost (tmux, ssh), a job named like a shell gives it away if
    FOLDCP_NPROC asks for ranks, which a task of srun need not.
    """
    if environ.get("SLURM_STEP_ID") in _OWN_STEPS:
        return False
    if any(name.startswith("SLURM_PTY_") for name in environ):
        return False
    shell = PurePath(environ.get("SLURM_JOB_NAME", "")).name.lstrip("-") in _SHELLS
    if shell and asks_for_ranks(environ):
        return False
    # The batch script itself carries SLURM_PROCID=0 and the job's SLURM_NTASKS, yet is alone.
    return "SLURM_STEP_ID" in environ or environ.get("ENVIRONMENT") != "BATCH"


def first_host(nodelist: str) -> str:
    """Return the first host of a Slurm node list, for example "gpu03" of "gpu[03-07,9],login1".

    Raises:
        ValueError: `nodelist` names no host.
    """
    match = re.match(r"([^\[,\s]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodelist.strip())
    if match is None:
        raise ValueError(f"SLURM_NODELIST {nodelist!r} names no host")
    return "".join(part or "" for part in match.groups())
