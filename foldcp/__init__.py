"""Context-parallel folding with stock Boltz: one complex over a mesh of GPUs or CPU processes."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "apply"]


def __getattr__(name: str) -> Any:
    # Loaded on use: `import foldcp` must work without Boltz.
    if name == "apply":
        return import_module("foldcp.boltz.swap").apply
    raise AttributeError(f"module 'foldcp' has no attribute {name!r}")
