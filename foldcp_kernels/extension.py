"""The compiled extension `foldcp_kernels._C`, if this installation has one that loads."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

OLDEST_TORCH = (2, 11)


@dataclass(frozen=True)
class Extension:
    """What was found.

    Args:
        ops: `torch.ops.foldcp`, None when there is no extension. cuda: release of CUDA that it was
            built with, "" without. chips: that it was built for. why: what is missing, and the
            remedy.
    """

    ops: Any
    cuda: str = ""
    chips: str = ""
    why: str = ""

    def described(self) -> str:
        """One line for `foldcp doctor`."""
        if self.ops is None:
            return f"none: {self.why}"
        return f"CUDA {self.cuda} for {self.chips}" if self.cuda else f"CPU only: {self.why}"


@lru_cache(maxsize=1)
def load() -> Extension:
    """Load the extension once; it needs no GPU, driver or NCCL.

    Returns:
        The extension, or why there is none.
    """
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < OLDEST_TORCH:
        return Extension(None, why=f"torch {torch.__version__} is older than 2.11: upgrade torch")
    try:
        build = importlib.import_module("foldcp_kernels._build_info").BUILD
    except ImportError:
        return Extension(None, why="it was not built: run `pip install -e . --no-build-isolation`")
    if not build["built"]:
        return Extension(None, why=build["why"])
    try:
        importlib.import_module("foldcp_kernels._C")
    except ImportError as error:
        return Extension(None, why=f"it does not load ({error}): build foldcp again")
    return Extension(torch.ops.foldcp, build["cuda"], build["chips"], build["why"])
