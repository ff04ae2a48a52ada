"""Configure torch's CUDA allocator: segments that grow, chosen before it takes any memory.

The sizes of a prediction's tensors change from stage to stage and from input to input; segments of
fixed sizes are then cut in pieces that fit nothing. CUDA graphs keep to pools of their own either
way, and what ranks share through CUDA IPC is not torch's (csrc/transports/cuda_carriers.cpp
allocates it).
"""

from __future__ import annotations

import logging
import os
from collections.abc import MutableMapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LOG = logging.getLogger("foldcp.runtime.allocator")
# torch 2.11 to 2.13 reads all of these; one that is set is the user's choice.
NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
SETTING = "expandable_segments:{}"


def grow_segments(environ: MutableMapping[str, str]) -> None:
    """Let segments grow, unless the user chose something; before torch takes any GPU memory.

    Args:
        environ: usually `os.environ`; processes started later inherit it.
    """
    if not any(environ.get(name) for name in NAMES):
        environ[NAMES[0]] = SETTING.format(True)


def check_growth(device: torch.device) -> None:
    """Take the first memory of a GPU; where segments cannot grow, go on with fixed ones.

    Some virtual GPUs, Jetson and WSL have no virtual memory for CUDA, or refuse it when asked.

    Args:
        device: of this rank.
    """
    import torch

    if device.type != "cuda" or os.environ.get(NAMES[0]) != SETTING.format(True):
        return
    try:
        torch.empty(1, device=device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        torch._C._accelerator_setAllocatorSettings(SETTING.format(False))
        torch.empty(1, device=device)  # raises again what has another cause
        LOG.warning("GPU memory is taken in segments of fixed sizes: %s", str(error).split("\n")[0])
