"""A CUDA device that exists only as shapes: live bytes of a forward on a machine without a GPU.

Tensors are fake (`FakeTensorMode`): no data, but the dtypes, shapes and lifetimes that a GPU would
see, CUDA autocast included. Small tensors whose values are known (features, ranges, tables of
indices) carry them along, so that code may branch on them as it does on a real device.

What is counted are storages, from their allocation to the end of their last view. Not counted:
workspaces inside one kernel, and rounding and fragmentation by the caching allocator.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten

_KNOWN_LIMIT = 1 << 18  # elements; the values of larger tensors are not kept
_NO_VALUE = {
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided,
    aten.rand, aten.randn, aten.randint, aten.rand_like, aten.randn_like, aten.randperm,
}  # fmt: skip
_DATA_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class LiveBytes:
    """Bytes of the storages that are alive on the fake device, and their peak.

    `note`, when set, is called as `(tensor) -> str` at the birth of each storage; the notes of the
    largest ones at the peak are kept in `at_peak`.
    """

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.at_peak: list[tuple[int, str]] = []
        self.note: Callable[[Tensor], str] | None = None
        self._live: dict[int, tuple[int, str]] = {}

    def see(self, x: Tensor) -> bool:
        """Count the storage of a tensor until it dies, once; False when it was seen before."""
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._live:
            return False
        self._live[key] = (size, self.note(x) if self.note is not None else "")
        weakref.finalize(storage, self._gone, key, size).atexit = False
        self.now += size
        if self.now > self.peak:
            self.peak = self.now
            if self.note is not None:
                self.at_peak = sorted((x for x in self._live.values() if x[1]), reverse=True)[:8]
        return True

    def _gone(self, key: int, size: int) -> None:
        del self._live[key]
        self.now -= size

    def restart(self) -> None:
        """Start a new peak from what is alive now."""
        self.peak, self.at_peak = self.now, []


class FakeDevice(TorchDispatchMode):
    """Runs operators on fake CUDA tensors, keeps known values along and counts live bytes."""

    def __init__(self, live: LiveBytes) -> None:
        super().__init__()
        self.live = live
        self._values = WeakIdKeyDictionary()

    def value(self, x: Tensor) -> Tensor | None:
        """The known values of a tensor, None when they are not known."""
        return self._values.get(x) if isinstance(x, FakeTensor) else x

    def known(self, value: Tensor) -> Tensor:
        """A fake CUDA tensor that carries the values of a CPU tensor."""
        out = aten.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
        self.live.see(out)
        self._values[out] = value
        return out

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        known = self._all_known(func, args, kwargs)
        if not known and func is aten.index.Tensor:
            args = (args[0], self._without_masks(args[1]))
        elif known and _DATA_DEPENDENT & set(func.tags):
            result = self._on_cpu(func, args, kwargs)
            with self:
                return tree_map_only(Tensor, self.known, result)
        out = func(*args, **kwargs)
        leaves = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for x in leaves:
            if x.device.type == "cuda":
                self.live.see(x)
        if known and all(x.numel() <= _KNOWN_LIMIT for x in leaves):
            values = tree_leaves(self._on_cpu(func, args, kwargs))
            for x, value in zip(tree_leaves(out), values, strict=True):
                if isinstance(x, FakeTensor):
                    self._values[x] = value
        elif func._schema.is_mutable:
            self._forget_written(func, args, kwargs)
        return out

    def _all_known(self, func: Any, args: tuple, kwargs: dict) -> bool:
        if func.overloadpacket in _NO_VALUE:
            return False
        inputs = (x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        return all(self.value(x) is not None for x in inputs)

    def _on_cpu(self, func: Any, args: tuple, kwargs: dict) -> Any:
        args, kwargs = tree_map_only(Tensor, self.value, (args, kwargs))
        args, kwargs = tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs))
        with _disable_current_modes():
            return func(*args, **kwargs)

    def _without_masks(self, indices: list[Tensor | None]) -> list[Tensor | None]:
        """The same indices with known boolean ones as numbers."""
        out: list[Tensor | None] = []
        for x in indices:
            value = None if x is None or x.dtype != torch.bool else self.value(x)
            if value is None:
                out.append(x)
                continue
            with _disable_current_modes():
                places = value.nonzero().unbind(1)
            with self:
                out += [self.known(p.contiguous()) for p in places]
        return out

    def _forget_written(self, func: Any, args: tuple, kwargs: dict) -> None:
        """Forget the values of what something unknown is written to."""
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[i] if i < len(args) else kwargs.get(argument.name)
                if isinstance(written, Tensor):
                    self._values.pop(written, None)


_PLAIN = {Tensor.__invert__: aten.bitwise_not.default, Tensor.nonzero: aten.nonzero.default}
_HOST = {Tensor.tolist, Tensor.item, Tensor.__int__, Tensor.__float__, Tensor.__bool__}


class _Python(TorchFunctionMode):
    """Python syntax through operators: the built-in paths ask for a real CUDA device."""

    def __init__(self, device: FakeDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[0], FakeTensor):
            x, indices = _basic(args[0], args[1])
            return x if indices is None else aten.index.Tensor(x, indices)
        if func is Tensor.__setitem__ and isinstance(args[0], FakeTensor):
            x, indices = _basic(args[0], args[1])
            new = args[2]
            if not isinstance(new, Tensor):
                new = torch.full((), new, dtype=x.dtype, device=x.device)
            if indices is None:
                aten.copy_.default(x, new.to(x.dtype).expand(x.shape))
            else:
                aten.index_put_.default(x, indices, new.to(x.dtype))
            return None
        if func in _PLAIN:
            return _PLAIN[func](args[0])
        if func is Tensor.new_tensor and isinstance(args[0], FakeTensor):
            return self._tensor(args[1], {"dtype": args[0].dtype} | (kwargs or {}))
        if func is torch.tensor and "cuda" in str((kwargs or {}).get("device")):
            return self._tensor(args[0], dict(kwargs or {}))
        if func is Tensor.contiguous:
            x = args[0]
            return x if x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)
        if func is Tensor.copy_:
            aten.copy_.default(args[0], args[1])
            return args[0]
        if func in _HOST and isinstance(args[0], FakeTensor):
            value = self.device.value(args[0])
            if value is None:
                raise RuntimeError(f"{func.__name__} of a tensor whose values are not known")
            with _disable_current_modes():
                return func(value)
        return func(*args, **(kwargs or {}))

    def _tensor(self, data: Any, options: dict[str, Any]) -> Tensor:
        options.pop("device", None)
        with _disable_current_modes():
            value = torch.tensor(data, **options)
        return self.device.known(value)


def _basic(x: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None] | None]:
    """Apply integers, slices, None and ... to `x`; index tensors are left, None without any."""
    parts = list(index) if isinstance(index, tuple) else [index]
    used = sum(
        i.ndim if isinstance(i, Tensor) and i.dtype == torch.bool else 1
        for i in parts
        if i is not None and i is not Ellipsis
    )
    left: list[Tensor | None] = []  # one entry per dimension of the result so far
    places = [k for k, i in enumerate(parts) if i is Ellipsis]
    for k in places:
        parts[k : k + 1] = [slice(None)] * (x.ndim - used)
    for i in parts:
        dim = len(left)
        if i is None:
            x = aten.unsqueeze.default(x, dim)
            left.append(None)
        elif isinstance(i, int):
            x = aten.select.int(x, dim, i)
        elif isinstance(i, slice):
            start, stop, step = i.indices(x.shape[dim])
            if (start, stop, step) != (0, x.shape[dim], 1):
                x = aten.slice.Tensor(x, dim, start, max(start, stop), step)
            left.append(None)
        else:
            i = i if isinstance(i, Tensor) else torch.tensor(i, device=x.device)
            left += [i] + [None] * (i.ndim - 1 if i.dtype == torch.bool else 0)
    if all(i is None for i in left):
        return x, None
    # A mask stands for as many dimensions as it has; operators want it once.
    return x, [i for k, i in enumerate(left) if not _inside_mask(left, k)]


def _inside_mask(left: list[Tensor | None], k: int) -> bool:
    return any(
        isinstance(m, Tensor) and m.dtype == torch.bool and j < k < j + m.ndim
        for j, m in enumerate(left)
    )


@contextmanager
def fake_cuda(dtype: torch.dtype = torch.bfloat16) -> Iterator[FakeDevice]:
    """Make device "cuda" fake inside, with autocast on and gradients off.

    Args:
        dtype: of autocast.

    Returns:
        The device; `device.live` counts, `device.known(x)` brings real tensors in.
    """
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    device = FakeDevice(LiveBytes())
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with torch.no_grad(), fake, device, _Python(device):
            yield device
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
