"""A CUDA device that exists only as shapes: live bytes of a forward on a machine without a GPU.

Tensors are fake (`FakeTensorMode`): no data, but the dtypes, shapes and lifetimes that a GPU would
see, CUDA autocast included. Small tensors whose values are known (features, ranges, tables of
indices) carry them along, so that code may branch on them as it does on a real device.

What is counted are storages, from their allocation to the end of their last view. Not counted:
workspaces inside a kernel, and rounding and fragmentation by the caching allocator.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten

_KNOWN_LIMIT = 1 << 20  # elements; the values of larger tensors are not kept
_UNKNOWN = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty)
_RANDOM = (aten.rand, aten.randn, aten.randint, aten.randperm, aten.rand_like, aten.randn_like)


class LiveBytes:
    """Bytes of the storages that are alive on the fake device, and their peak.

    Args:
        where: called at each new peak, to note what made it; None for nothing.
    """

    def __init__(self, where: Callable[[], Any] | None = None) -> None:
        self.now = self.peak = 0
        self.culprit: Any = None
        self._where = where
        self._seen: set[int] = set()

    def see(self, x: Tensor) -> None:
        """Count the storage of a tensor until it dies, once."""
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(key)
        weakref.finalize(storage, self._gone, key, size).atexit = False
        self.now += size
        if self.now > self.peak:
            self.peak = self.now
            if self._where is not None:
                self.culprit = self._where()

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size

    def restart(self) -> None:
        """Start a new peak from what is alive now."""
        self.peak, self.culprit = self.now, None


class FakeDevice(TorchDispatchMode):
    """Runs operators on fake tensors, keeps known values along and counts live bytes."""

    def __init__(self, fake: FakeTensorMode, live: LiveBytes) -> None:
        super().__init__()
        self.fake, self.live = fake, live
        self._values = WeakIdKeyDictionary()

    def known(self, value: Tensor) -> Tensor:
        """A fake CUDA tensor that carries the values of a CPU tensor."""
        with self.fake:
            out = torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device="cuda"
            )
        self._values[out] = value
        self.live.see(out)
        return out

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        value = self._value_of(func, args, kwargs)
        if value is not None and _depends_on_data(func):
            if func is aten._local_scalar_dense.default:
                return value
            out = tree_map_only(Tensor, self.known, value)
            return out
        out = func(*args, **kwargs)
        self._note(out, value)
        written = func._schema.is_mutable and value is None
        for x in tree_flatten((args, kwargs))[0] if written else ():
            # Of a known tensor that something unknown is written to, nothing is known any more.
            if isinstance(x, Tensor) and x is out:
                self._values.pop(x, None)
        return out

    def _note(self, out: Any, value: Any) -> None:
        flat = tree_flatten(out)[0]
        values = tree_flatten(value)[0] if value is not None else [None] * len(flat)
        for x, v in zip(flat, values, strict=True):
            if not isinstance(x, Tensor):
                continue
            if x.device.type == "cuda":
                self.live.see(x)
            if isinstance(v, Tensor) and v.numel() <= _KNOWN_LIMIT:
                self._values[x] = v

    def _value_of(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """What the operator gives on the CPU, None where an input is unknown or large."""
        flat, _ = tree_flatten((args, kwargs))
        tensors = [x for x in flat if isinstance(x, Tensor)]
        packet = func.overloadpacket
        if any(isinstance(x, FakeTensor) and x not in self._values for x in tensors):
            return None
        if packet in _RANDOM or packet in _UNKNOWN or not _small(func, tensors, args):
            return None
        with _outside_modes():
            swap = lambda x: self._values.get(x, x)  # noqa: E731
            args, kwargs = tree_map_only(Tensor, swap, (args, kwargs))
            if "device" in kwargs:
                kwargs["device"] = torch.device("cpu")
            return func(*args, **kwargs)


@contextmanager
def _outside_modes() -> Iterator[None]:
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        yield


def _depends_on_data(func: Any) -> bool:
    tags = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    return any(tag in func.tags for tag in tags)


def _small(func: Any, tensors: list[Tensor], args: tuple) -> bool:
    """Whether the result is small: the broadcast of the inputs, or the size a factory is given."""
    total = 1
    if not tensors:
        sizes = args[0] if args and isinstance(args[0], (list, tuple)) else args[:2]
        for n in sizes:
            total *= max(1, int(n)) if isinstance(n, (int, float)) else 1
        return total <= _KNOWN_LIMIT
    for x in tensors:
        total = max(total, x.numel())
    if len(tensors) > 1:
        try:
            total = max(total, torch.Size(torch.broadcast_shapes(*(x.shape for x in tensors))).numel())
        except RuntimeError:
            pass
    return total <= _KNOWN_LIMIT
