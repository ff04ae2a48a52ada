"""Context-parallel folding with stock Boltz: one complex over a mesh of GPUs or CPU processes."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from foldcp._version import __version__

# Where what is public lives; loaded on use: `import foldcp` needs neither Boltz nor a second.
_PUBLIC = {
    "Mesh": "foldcp.fabric.mesh",
    "Model": "foldcp.boltz.api.session",
    "Prediction": "foldcp.boltz.api.predictions",
    "UserError": "foldcp.errors",
    "apply": "foldcp.boltz.families.swap",
    "load": "foldcp.boltz.api.session",
}
__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'foldcp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
