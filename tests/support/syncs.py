"""Finds what would make the host wait for the device, on any device, and a stand-in of CUDA graphs.

Both watch the operators of a stretch of code. On a CPU nothing waits, so what is found are the
calls that would: reading a value, sizes that depend on values, copies between host and device,
decompositions that look at their own success.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from foldcp_kernels.core.triton_launch import launch as _launch

# Python reads a value, or makes a tensor from host numbers (a copy that is waited for on CUDA).
_READS = {
    Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__bool__, Tensor.__int__,
    Tensor.__float__, Tensor.__index__, Tensor.__array__, torch.tensor, torch.as_tensor,
    torch.from_numpy, Tensor.new_tensor, torch.equal, torch.allclose,
}  # fmt: skip
_MOVES = {Tensor.to, Tensor.copy_, Tensor.type}
_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# Modules that launch kernels.
_LAUNCHERS = [
    f"foldcp_kernels.{name}.fused"
    for name in (
        "adaptive_norm", "attention", "binned_heads", "gated_output", "norm_linear",
        "outer_product_mean", "relative_position", "transition",
    )
]  # fmt: skip
_INDEXING = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_}


class Syncs:
    """Collects, while entered, the names of everything that would wait: `found`."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.operators = 0

    def __enter__(self) -> Syncs:
        self._stack = ExitStack()
        self._stack.enter_context(_Calls(self))
        self._stack.enter_context(_Operators(self))
        for name in ("synchronize", "Event.synchronize", "Stream.synchronize"):
            where = torch.cuda
            for part in name.split(".")[:-1]:
                where = getattr(where, part)
            spy = mock.Mock(side_effect=lambda *_, n=name: self.found.append(f"cuda.{n}"))
            self._stack.enter_context(mock.patch.object(where, "synchronize", spy))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


class _Calls(TorchFunctionMode):
    def __init__(self, syncs: Syncs) -> None:
        super().__init__()
        self._syncs = syncs

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _READS:
            self._syncs.found.append(func.__name__)
        elif func in _MOVES:
            targets = [*args[1:], *kwargs.values()]
            if any(str(x) == "cpu" for x in targets if isinstance(x, (str, torch.device))):
                self._syncs.found.append(f"{func.__name__} the host")
        return func(*args, **kwargs)


class _Operators(TorchDispatchMode):
    def __init__(self, syncs: Syncs) -> None:
        super().__init__()
        self._syncs = syncs

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self._syncs.operators += 1
        name = func.overloadpacket.__name__
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        waits = bool(_TAGS & set(func.tags)) or "linalg" in name
        if func.overloadpacket in _INDEXING:
            indices = (x for x in args[1] if x is not None)
            waits |= any(x.dtype in (torch.bool, torch.uint8) for x in indices)
        out = func(*args, **(kwargs or {}))
        kinds = {x.device.type for x in (*given, *tree_leaves(out)) if isinstance(x, Tensor)}
        if waits or (name in ("_to_copy", "copy_") and len(kinds) > 1):
            self._syncs.found.append(name)
        return out


class Tape:
    """A recorder (see step_graph.py) that does on any device what a CUDA graph does.

    Operators, and launches of Triton kernels, are kept with the very tensors that they read; a
    replay runs them on those again and writes where they wrote. Host numbers stay what they were.
    Nothing that was there before is changed while recording. Reading a value cannot be recorded,
    and random numbers must not be.
    """

    def __init__(self) -> None:
        self.recorded = self.replayed = self.released = self.warmed = 0

    def warm_up(self, call: Callable[[], Any]) -> Any:
        """See `Recorder`."""
        self.warmed += 1
        return call()

    def record(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """See `Recorder`."""
        with _Recording() as made:
            out = call()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            for again in made.again:
                again()

        return replay, out

    def release(self) -> None:
        """See `Recorder`."""
        self.released += 1


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.again: list[Callable[[], None]] = []
        self._fresh: set[int] = set()
        self._kept: list[Tensor] = []  # storages must not be used again while recording
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> _Recording:
        self._stack = ExitStack()
        for name in _LAUNCHERS:
            patch = mock.patch.object(import_module(name), "launch", self._launch)
            self._stack.enter_context(patch)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()
        for x, content in self._before.values():
            x.copy_(content)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _TAGS & set(func.tags):
            raise RuntimeError(f"{func} cannot be recorded")
        draws = torch.Tag.nondeterministic_seeded in func.tags and torch.get_rng_state()
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func._schema.is_mutable:
            self._keep(given)
        out = func(*args, **kwargs)
        if draws is not False and not torch.equal(draws, torch.get_rng_state()):
            torch.set_rng_state(draws)
            raise RuntimeError(f"{func} draws random numbers in a recording")
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        read = {_storage(x) for x in given}
        fresh = [x for x in made if _storage(x) not in read]
        self._fresh |= {_storage(x) for x in fresh}
        self._kept += fresh
        if func._schema.is_mutable or fresh:
            self.again.append(partial(_run_again, func, args, kwargs, fresh))
        return out

    def _launch(self, kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
        self._keep([x for x in args if isinstance(x, Tensor)])
        with _disable_current_modes():
            _launch(kernel, grid, *args, **options)
        self.again.append(partial(_launch, kernel, grid, *args, **options))

    def _keep(self, tensors: list[Tensor]) -> None:
        """Remember what is in tensors that are older than the recording."""
        for x in tensors:
            if _storage(x) not in self._fresh and _storage(x) not in self._before:
                with _disable_current_modes():
                    whole = torch.empty(0, dtype=torch.uint8, device=x.device)
                    whole.set_(x.untyped_storage())
                    self._before[_storage(x)] = whole, whole.clone()


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _run_again(func: Any, args: tuple, kwargs: dict, fresh: list[Tensor]) -> None:
    read = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
    out = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
    for x, new in zip(fresh, (x for x in out if _storage(x) not in read), strict=True):
        x.copy_(new)
