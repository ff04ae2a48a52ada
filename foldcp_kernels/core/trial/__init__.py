"""Try whether Triton's kernels run on a GPU: launch a tiny one, once per process and GPU.

Triton compiles with the C compiler, Python.h, ptxas and cache folder of the machine that it runs
on. An image that lacks one of them would fail in the first op, with an error of Triton's own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
from functools import lru_cache
from importlib import import_module, metadata, util
from pathlib import Path

import torch
from torch.utils._python_dispatch import _disable_current_modes

OLDEST_GPU = (8, 0)
OLDEST_TRITON = (3, 6)  # the kernels were compiled with 3.6 and 3.7
_SIZE = 32


def version() -> str:
    """Ask the installed Triton for its release; some builds of torch bring it by another name."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return import_module("triton").__version__


@lru_cache
def package_fault() -> str | None:
    """Say why Triton cannot be used on any device, None where it can."""
    if util.find_spec("triton") is None:
        return "the package triton is not installed: pip install triton"
    try:
        found = version()
    except Exception as error:
        return f"triton does not import ({error}): install the triton that your torch names"
    if tuple(int(x) for x in found.split(".")[:2]) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"triton is {found}; expected {oldest} or newer: install a newer torch"
    return None


def fault(device: torch.device) -> str | None:
    """Say why Triton's kernels cannot run on a GPU, None where they can; the answer is kept.

    Args:
        device: a CUDA device.

    Returns:
        One line: what is missing, and the remedy.
    """
    if package_fault():
        return package_fault()
    index = torch.cuda.current_device() if device.index is None else device.index
    found = torch.cuda.get_device_capability(index)
    if found < OLDEST_GPU:
        return f"the GPU is sm_{found[0]}{found[1]}; expected sm_80 or newer"
    if torch.cuda.is_current_stream_capturing():
        return None  # reading the result would end the capture
    return _trial(index)


@lru_cache
def _trial(index: int) -> str | None:
    with _disable_current_modes():  # the answer is about the GPU, not about fake tensors
        return launch_on(torch.device("cuda", index))


def launch_on(device: torch.device) -> str | None:
    """Launch the tiny kernel and check its result.

    Args:
        device: a CUDA device; the CPU under TRITON_INTERPRET=1.

    Returns:
        Why it did not run, None when it did.
    """
    x = torch.arange(_SIZE, dtype=torch.int32, device=device)
    out = torch.zeros_like(x)
    try:
        import_module("foldcp_kernels.core.trial.kernel").run(x, out)
        got = out.tolist()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return explain(error)
    if got != [4 * i for i in range(_SIZE)]:
        return "its trial kernel computed wrong numbers: install the triton that your torch names"
    return None


def explain(error: BaseException) -> str:
    """Say in one line what Triton lacks on this machine, and the remedy.

    Args:
        error: what a launch raised.
    """
    text = " ".join(str(error).split())
    name = str(getattr(error, "filename", None) or "")
    include = sysconfig.get_path("include")
    command = error.cmd if isinstance(error, subprocess.CalledProcessError) else ""
    if "find C compiler" in text or (name and name == os.environ.get("CC")):
        return "no C compiler: install gcc, or name one in CC"
    if re.search(r"libcuda\.so.*(found|cannot open)", text) or "ldconfig" in f"{name} {command}":
        return "no libcuda.so.1: name its folder in TRITON_LIBCUDA_PATH and LD_LIBRARY_PATH"
    if command and "-shared" in command:
        if not Path(include, "Python.h").is_file():
            return f"no Python.h in {include}: install python3-dev"
        return f"the C compiler {command[0]} failed: its message is above; repair it, or set CC"
    if "ptxas" in text.lower() or "ptxas" in name:
        return f"ptxas failed ({text}): install the triton that your torch names again"
    if isinstance(error, OSError) or "failed to map segment" in text:
        return f"its cache fails ({text}): name a folder to write to in TRITON_CACHE_DIR"
    what = ": ".join(filter(None, (type(error).__name__, text)))
    return f"{what}: install the triton that your torch names"
