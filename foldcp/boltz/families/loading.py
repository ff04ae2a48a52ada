"""Load a checkpoint of Boltz without drawing the weights that it replaces.

Stock initialises every weight at random, which takes most of the time, and then copies the
checkpoint's over it. Here draws are counted, not made, weights are mapped from the file, so that
ranks of a machine share their pages, and the generators are left as stock leaves them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from foldcp.boltz.families.mersenne import skip

_WORDS = slice(24, 24 + 8 * 624)  # of torch's state: where the words stand, 64 bits each
_LEFT, _NEXT = slice(8, 12), slice(16, 24)
_UNIFORM, _NORMAL = torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default
_FILLS = (torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default)


def load(stock: type, path: str | Path, *args: Any, **options: Any) -> nn.Module:
    """Load a checkpoint as `stock.load_from_checkpoint` does, only faster.

    Args:
        stock: a Lightning module's class.
        path: of the checkpoint.
        args: as Lightning's.
        options: as Lightning's. Without `strict`, and where an initialisation draws otherwise than
            is known here, stock's own loading runs.

    Returns:
        The model; its weights are pages of the file, private to this process once it writes them.
        The global generators of torch and NumPy are as after stock's.
    """
    if options.get("strict") is not True:
        return stock.load_from_checkpoint(path, *args, **options)
    with _counted() as draws, _mapped(stock):
        model = stock.load_from_checkpoint(path, *args, **options)
    if draws.others():
        del model
        draws.undo()
        return stock.load_from_checkpoint(path, *args, **options)
    draws.take()
    return model


class _Draws(TorchDispatchMode):
    """Count what initialisation would draw from the global generators, and draw nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.of_torch = self.of_numpy = 0  # words of 32 bits
        self._torch, self._numpy = torch.get_rng_state(), _numpy_state()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        x = args[0] if args else None
        # The checkpoint has every parameter (strict), not every buffer.
        if isinstance(x, nn.Parameter) and x.device.type == "cpu" and x.is_contiguous():
            if func in _FILLS:
                return x
            # Of normal numbers torch makes 16 at once from as many words, the rest otherwise.
            counted = func is _UNIFORM or (func is _NORMAL and x.numel() % 16 == 0)
            if counted and x.dtype == torch.float32 and not (kwargs or {}).get("generator"):
                self.of_torch += x.numel()
                return x
        return func(*args, **(kwargs or {}))

    def truncated_normal(self, weights: Tensor, *_: Any, **__: Any) -> None:
        """Replace Boltz's `trunc_normal_init_`: SciPy takes a double for each, of two words."""
        self.of_numpy += 2 * weights.numel()

    def others(self) -> bool:
        """Tell whether a generator moved by draws that are not counted."""
        moved = not torch.equal(self._torch, torch.get_rng_state())
        return moved or not _alike(self._numpy, _numpy_state())

    def undo(self) -> None:
        """Leave the generators as they were before."""
        torch.set_rng_state(self._torch)
        np.random.set_state(self._numpy)  # noqa: NPY002

    def take(self) -> None:
        """Leave the generators as the draws would."""
        torch.set_rng_state(_torch_skipped(self._torch, self.of_torch))
        kind, key, position, *gauss = self._numpy
        key, position = skip(key, position, self.of_numpy)
        np.random.set_state((kind, key, position, *gauss))  # noqa: NPY002


def _numpy_state() -> tuple[Any, ...]:
    return tuple(np.random.get_state(legacy=True))  # noqa: NPY002


def _alike(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return a[0] == b[0] == "MT19937" and bool((a[1] == b[1]).all()) and a[2:] == b[2:]


def _torch_skipped(state: Tensor, count: int) -> Tensor:
    """A state of torch's CPU generator after so many words."""
    if count == 0:
        return state
    raw = state.numpy().tobytes()
    key = np.frombuffer(raw[_WORDS], np.uint64).astype(np.uint32)
    left = int.from_bytes(raw[_LEFT], "little")
    key, position = skip(key, 625 - left, count)
    new = bytearray(raw)
    new[_WORDS] = key.astype(np.uint64).tobytes()
    new[_LEFT] = (625 - position).to_bytes(4, "little")
    new[_NEXT] = position.to_bytes(8, "little")
    return torch.frombuffer(new, dtype=torch.uint8).clone()


@contextmanager
def _counted() -> Iterator[_Draws]:
    """Count draws of the models that are made within."""
    from boltz.model.layers import initialize

    draws = _Draws()
    known = _a_double_each(initialize.trunc_normal_init_)
    counted = mock.patch.object(initialize, "trunc_normal_init_", draws.truncated_normal)
    with counted if known else nullcontext(), draws:  # what is drawn after all is noticed
        yield draws


def _a_double_each(stock: Callable[[Tensor], None]) -> bool:
    """Tell whether the installed SciPy draws for n numbers as NumPy does for n uniform ones."""
    before = _numpy_state()
    stock(torch.empty(3, 3))
    drawn = _numpy_state()
    np.random.set_state(before)  # noqa: NPY002
    np.random.uniform(size=9)  # noqa: NPY002
    alike = _alike(drawn, _numpy_state())
    np.random.set_state(before)  # noqa: NPY002
    return alike


@contextmanager
def _mapped(stock: type) -> Iterator[None]:
    """Weights are pages of the file, and become the model's own tensors."""
    from pytorch_lightning.core import saving

    plain, fill = saving.pl_load, stock.load_state_dict

    def read(path: str | Path, map_location: Any = None, **options: Any) -> Any:
        try:
            return torch.load(
                path, map_location, mmap=True, weights_only=bool(options.get("weights_only"))
            )
        except RuntimeError:  # an old format, or a file system that maps nothing
            return plain(path, map_location=map_location, **options)

    def assign(self: nn.Module, found: dict[str, Tensor], strict: bool = True) -> Any:
        own = self.state_dict()
        cast = {k: x.to(own[k].dtype) if k in own else x for k, x in found.items()}
        return fill(self, cast, strict=strict, assign=True)

    with (
        mock.patch.object(saving, "pl_load", read),
        mock.patch.object(stock, "load_state_dict", assign),
    ):
        yield
