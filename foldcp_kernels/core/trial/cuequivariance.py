"""Say whether NVIDIA's cuEquivariance can run: its packages, their versions, and the pip line."""

from __future__ import annotations

import re
import warnings
from functools import lru_cache
from importlib import import_module
from types import ModuleType

import torch

OLDEST = (0, 13)  # the tests run its Python
_PACKAGES = ("cuequivariance_torch", "cuequivariance_ops_torch")  # the second has the kernels


def pip_line() -> str:
    """Return the command that installs the packages for the CUDA version of this torch."""
    cuda = (torch.version.cuda or "13").partition(".")[0]
    oldest = ".".join(map(str, OLDEST))
    names = ("cuequivariance-torch", f"cuequivariance-ops-torch-cu{cuda}")
    return "pip install " + " ".join(f"'{name}>={oldest}'" for name in names)


@lru_cache
def fault() -> str | None:
    """Say why cuEquivariance cannot run, None where its packages are there and import.

    Returns:
        One line: what is wrong, and the remedy. The packages are imported, once.
    """
    found, missing = [], []
    for name in _PACKAGES:
        try:
            with warnings.catch_warnings():  # it sets the filters of the process
                found.append(import_module(name))
        except Exception as error:
            if not isinstance(error, ModuleNotFoundError) or error.name != name:
                return f"{name} does not import ({_one_line(error)}): {pip_line()}"
            missing.append(name)
    if missing:
        return f"{' and '.join(missing)} not installed: {pip_line()}"
    for package in found:
        version = getattr(package, "__version__", "of unknown version")
        if tuple(int(x) for x in re.findall(r"\d+", version)[:2]) < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            return f"{package.__name__} is {version}; expected {oldest} or newer: {pip_line()}"
    # It imports without its Triton kernels, and then raises when one is called.
    if reason := getattr(found[1], "IMPORT_EXCEPTION", None):
        last = reason.strip().splitlines()[-1]
        return f"the Triton kernels of {_PACKAGES[1]} do not import ({last}): {pip_line()}"
    return None


def package() -> ModuleType:
    """Import the package `cuequivariance_torch`.

    Raises:
        ValueError: it cannot run.
    """
    if why := fault():
        raise ValueError(f"impl='cuequivariance' cannot run: {why}")
    return import_module(_PACKAGES[0])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).replace(": ", " ")
