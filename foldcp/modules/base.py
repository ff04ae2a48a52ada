"""The base of every module on tiles: it takes over the parameters of its Boltz twin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foldcp.fabric.mesh import Mesh


class TiledModule(nn.Module):
    """A module that works on tiles with the parameters (and attribute names) of its Boltz twin.

    Args:
        twin: the Boltz module; its children, parameters and buffers become this module's, so
            `state_dict` and `load_state_dict` are those of the twin.
        mesh: the mesh of ranks.
    """

    def __init__(self, twin: nn.Module, mesh: Mesh) -> None:
        super().__init__()
        self.mesh = mesh
        for name, child in twin.named_children():
            self.add_module(name, child)
        for name, parameter in twin.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in twin.named_buffers(recurse=False):
            persistent = name not in twin._non_persistent_buffers_set
            self.register_buffer(name, buffer, persistent=persistent)
        self.train(twin.training)

    if TYPE_CHECKING:  # what the twin has is not known to tools

        def __getattr__(self, name: str) -> Any: ...


class Block(nn.Module):
    """One block of a stack: the random numbers that it draws, and what it computes without them.

    Attributes:
        in_place: which tensors of the state are updated in place when gradients are off.
        mesh: the mesh.
    """

    in_place: tuple[bool, ...] = (True,)
    mesh: Mesh

    def draw(self, *state_and_layout: Any) -> None:
        """Draw and drop the numbers of the dropout masks, as stock does before and in between."""
        raise NotImplementedError

    def compute(self, *tensors_and_layout: Any) -> tuple[Tensor, ...]:
        """Compute the new state from the old one, what the whole stack reads, and the layout."""
        raise NotImplementedError

    def operations(self, *state: Tensor) -> float:
        """Count the floating-point operations of `compute`, its largest terms."""
        raise NotImplementedError


def wide(x: Tensor) -> Tensor:
    """Widen `x` to float32; float64 stays, so that float64 runs are float64 throughout."""
    return x if x.dtype == torch.float64 else x.float()


def draw_dropout(shape: tuple[int, ...], device: torch.device) -> None:
    """Draw and drop the numbers of a dropout mask, as stock Boltz does even in eval mode.

    With these draws left out, the sampler's noise would differ from that of stock at the same seed.

    Args:
        shape: of the mask.
        device: of the generator.
    """
    torch.rand(shape, dtype=torch.float32, device=device)


def draw_pair_dropout(batch: int, n: int, device: torch.device) -> None:
    """Draw the four dropout masks of one pairformer layer (three row-wise, one column-wise).

    Args:
        batch: B.
        n: N.
        device: of the generator.
    """
    for _ in range(3):
        draw_dropout((batch, n, 1, 1), device)
    draw_dropout((batch, 1, n, 1), device)
