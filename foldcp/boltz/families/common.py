"""Check a model before it is swapped, and say what was swapped: alike for Boltz-1 and Boltz-2."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class SwapReport:
    """Attribute names of the model that were swapped."""

    swapped: tuple[str, ...]

    def summary(self) -> str:
        """Summarise the swap in one short phrase for the start line."""
        return "swapped " + ", ".join(self.swapped)


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module that a compiled one was made from, or the module itself."""
    return getattr(module, "_orig_mod", module)


def check_unswapped(model: nn.Module) -> None:
    """Refuse a model in training mode, or one that was swapped before.

    Args:
        model: a Boltz-1 or Boltz-2.

    Raises:
        ValueError: it is one of these.
    """
    if model.training:
        raise ValueError("`model` is in training mode: call model.eval() first")
    if hasattr(model, "foldcp"):
        raise ValueError("`model` was swapped before: load it again to swap it for another mesh")
