"""The compiled extension `foldcp_kernels._C`, if this installation has one that loads."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

OLDEST_TORCH = (2, 11)
AGAIN = "run `pip install --force-reinstall --no-deps .` in the clone"


@dataclass(frozen=True)
class Extension:
    """The compiled extension, or the reason why there is none.

    Args:
        ops: `torch.ops.foldcp`, None when there is no extension.
        cuda: release of CUDA that it was built with, "" without.
        chips: that it was built for.
        why: what is missing, and the remedy.
        line: what the installation said that it built.
    """

    ops: Any
    cuda: str = ""
    chips: str = ""
    why: str = ""
    line: str = ""

    def described(self) -> str:
        """Describe the build in one line for `foldcp doctor`, or the reason why none loads."""
        return f"none: {self.why}" if self.ops is None else self.line

    def missing(self, device: torch.device) -> str | None:
        """Say why it cannot carry tiles of a device, None where it can.

        Args:
            device: of this rank.
        """
        if self.ops is None:
            return self.why
        if device.type != "cuda":
            return None
        if not self.cuda:
            return f"it is {self.line}"
        driver = driver_version()
        if driver and driver // 1000 < int(self.cuda.split(".")[0]):
            return (
                f"it is for CUDA {self.cuda}, the driver runs CUDA {driver // 1000}."
                f"{driver % 1000 // 10}: update the driver, or build it with an older CUDA"
            )
        major, minor = torch.cuda.get_device_capability(device)
        if not covers(self.chips, 10 * major + minor):
            chip = f"{major}.{minor}"
            return (
                f"it is for {self.chips}, the GPU is sm_{major}{minor}: set TORCH_CUDA_ARCH_LIST "
                f"to {chip}+PTX and {AGAIN}"
            )
        return None


def covers(chips: str, chip: int) -> bool:
    """Tell whether code for a list of chips runs on one.

    Args:
        chips: a list such as "8.0+PTX;9.0a".
        chip: 86 for sm_86.
    """
    for major, minor, variant, ptx in re.findall(r"(\d+)\.(\d)([af]?)(\+PTX)?", chips):
        number = int(major + minor)
        same_family = number // 10 == chip // 10 and number <= chip and variant != "a"
        if number == chip or same_family or (ptx and number <= chip):
            return True
    return False


def driver_version() -> int:
    """Return the CUDA that the driver runs, 12080 for 12.8; 0 where torch for CPUs cannot tell."""
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    return ask() if ask else 0


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
        return Extension(None, why=f"it was not built: {AGAIN}")
    if not build["built"]:
        return Extension(None, why=build["why"])
    try:
        importlib.import_module("foldcp_kernels._C")
    except ImportError as error:
        reason = " ".join(str(error).split())
        return Extension(None, why=f"it does not load ({reason}): {AGAIN}")
    line = build.get("line", f"of an older foldcp: {AGAIN}")
    return Extension(torch.ops.foldcp, build["cuda"], build["chips"], build["why"], line)
