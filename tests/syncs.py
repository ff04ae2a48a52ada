"""Finds what would make the host wait for the device, on any device, and a stand-in of CUDA graphs.

Both watch the operators of a stretch of code. On a CPU nothing waits, so what is found are the
calls that would: reading a value, sizes that depend on values, copies between host and device,
decompositions that look at their own success.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Python reads a value, or makes a tensor from host numbers (a copy that is waited for on CUDA).
_READS = {
    Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__bool__, Tensor.__int__,
    Tensor.__float__, Tensor.__index__, Tensor.__array__, torch.tensor, torch.as_tensor,
    torch.from_numpy, Tensor.new_tensor, torch.equal, torch.allclose,
}  # fmt: skip
_MOVES = {Tensor.to, Tensor.copy_, Tensor.type}
_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
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
    """A recorder (see foldcp.modules.step_graph) that does on any device what a CUDA graph does.

    Operators are kept with the very tensors that they read; a replay runs them on those again and
    writes where they wrote. Host numbers stay what they were, and reading a value cannot be
    recorded.
    """

    def __init__(self) -> None:
        self.recorded = self.replayed = self.released = 0

    def record(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """See `Recorder`."""
        operators: list[tuple] = []
        with _Recording(operators):
            out = call()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            for func, args, kwargs, old in operators:
                for x, new in zip(old, tree_leaves(func(*args, **kwargs)), strict=False):
                    x.copy_(new)

        return replay, out

    def release(self) -> None:
        """See `Recorder`."""
        self.released += 1


class _Recording(TorchDispatchMode):
    def __init__(self, operators: list[tuple]) -> None:
        super().__init__()
        self._operators = operators

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _TAGS & set(func.tags):
            raise RuntimeError(f"{func} cannot be recorded")
        out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        read = {
            x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)
        }
        fresh = [x for x in made if x.untyped_storage()._cdata not in read]
        if func._schema.is_mutable:
            self._operators.append((func, args, kwargs, ()))
        elif fresh:
            self._operators.append((func, args, kwargs, fresh))
        return out
