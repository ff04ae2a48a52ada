"""Errors whose text the user can act on, and the sentences that they share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from foldcp.config import resumes
from foldcp_boot import runs_boltz

EXCHANGE = "exchange of tiles"  # how errors of an exchange under way begin
SEE_LOG = "foldcp.log in the results folder says why"
_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")


class UserError(RuntimeError):
    """Something the user can put right; its text says how, and is shown without a traceback."""


class TransportError(UserError):
    """Ranks can no longer exchange anything; says which rank and why, alike on all of them."""


class InputLost(ValueError):
    """Drops one input while the run goes on; raised alike on all ranks of its mesh."""


def on_disk() -> str:
    """Say which results of a run that ends early are on disk."""
    text = "finished predictions are kept and skipped by the next run of the same command"
    if resumes(os.environ):
        return text
    return f"{text} (with FOLDCP_RESUME=DIR also the trunk of an unfinished one)"


def is_command() -> bool:
    """Tell a process of the command `boltz` or `foldcp` from a program of the user's."""
    started = Path(sys.argv[0] if sys.argv else "")
    ours = started.name in ("__main__.py", "rank.py") and "foldcp" in started.parts
    return started.name == "foldcp" or ours or runs_boltz()


def with_ranks(number: int | str) -> str:
    """Say how to start the running program on several ranks of one machine, for messages.

    Args:
        number: of ranks.
    """
    if is_command():
        return f"`foldcp run --nproc {number} predict ...`"
    name = Path(sys.argv[0] if sys.argv else "").name
    script = name if name.endswith(".py") and not name.startswith("__") else "script.py"
    return f"`torchrun --nproc-per-node {number} {script}`"


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory, of the host or of a GPU, was used up."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, (RuntimeError, OSError)) and any(part in text for part in _MEMORY)
