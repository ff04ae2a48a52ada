"""Stands for GPU, driver and links where the host alone is counted and timed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# The module; the package has its op of the same name.
_MULTIPLICATION = import_module("foldcp_kernels.triangle_multiplication.contraction")
# Operators of torch that launch nothing.
_VIEWS = {
    "view", "slice", "select", "alias", "detach", "empty", "new_empty", "empty_like", "as_strided",
    "transpose", "t", "permute", "unsqueeze", "squeeze", "expand", "_unsafe_view", "split",
    "split_with_sizes", "unbind", "empty_strided", "new_empty_strided", "unfold", "diagonal",
}  # fmt: skip


class Counted:
    """A link that counts what it is given; the engine's own link takes it from there.

    Args:
        link: of the engine.
        communicators: that the engine of this revision has, 1 or 3.
        cols: of the mesh, on rank 0.
    """

    staged = True

    def __init__(self, link: Any, communicators: int, cols: int) -> None:
        self.name, self._link, self._lanes, self._cols = "counted", link, communicators, cols
        self.counts: Counter[str] = Counter()
        self.counting, self.exchanges = False, getattr(link, "exchanges", None)

    def flight(self) -> Any:
        """Begin an exchange."""
        flight = self._link.flight()
        if not self.counting:
            return flight
        self.counts["exchanges"] += 1
        post, replay = flight.post, getattr(flight, "replay", None)

        def posted(slot: int, sends: Any, recvs: Any, *rest: Any) -> None:
            self._count([*sends, *recvs])
            post(slot, sends, recvs, *rest)

        def replayed(slot: int, program: Any, step: int, *rest: Any) -> None:
            act = program.acts[step]
            self._count([*act.sends, *act.recvs])
            replay(slot, program, step, *rest)

        flight.post = posted
        if replay is not None:
            flight.replay = replayed
        return flight

    def _count(self, messages: list[Any]) -> None:
        lane = {
            m.peer: 0 if m.peer < self._cols else 1 + (m.peer % self._cols > 0) for m in messages
        }
        self.counts["groups"] += len(set(lane.values())) if self._lanes > 1 else bool(messages)
        for m in messages:
            self.counts["messages"] += 1
            self.counts["transfers"] += getattr(m, "runs", 1)
            if not m.direct():
                self.counts["packed"] += 1
                self.counts["packed_pieces"] += len(m.fp8)
                self.counts["staged_bytes"] += -(-m.bytes() // 256) * 256

    def abort(self, message: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Launches(TorchDispatchMode):
    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in _VIEWS and func.namespace == "aten":
            self.counts["torch_launches"] += 1
        return func(*args, **(kwargs or {}))


launched: Counter[str] = Counter()  # Triton keeps kernels for as long as the process lives


class _Kernel:
    """A compiled kernel that is never handed to a driver."""

    function, packed_metadata, metadata = 0, (), SimpleNamespace(shared=0, num_warps=4)

    def launch_metadata(self, *_: Any) -> None:
        """Nothing."""

    def run(self, *_: Any) -> None:
        """Nothing; counts."""
        launched["triton_launches"] += 1


@contextmanager
def no_driver() -> Iterator[None]:
    """Triton handles launches as on an H100, but compiles nothing and hands nothing to a driver."""
    import triton
    from triton.runtime.jit import JITFunction

    from foldcp_kernels.core import triton_launch as launch

    def made(self: Any, key: Any, signature: Any, device: Any, *_: Any) -> _Kernel:
        kernel = self.device_caches[device][0][key] = _Kernel()
        return kernel

    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(launch._Chip(90))
    try:
        with (
            mock.patch.object(JITFunction, "_do_compile", made),
            mock.patch.object(launch, "capability", lambda device: 90),
        ):
            yield
    finally:
        triton.runtime.driver._active = before


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Shapes alone are taken for CUDA tensors: bfloat16 autocast, fused kernels, no gradients."""
    autocast = torch.autocast

    def cuda(device: str, **options: Any) -> Any:
        return autocast("cuda" if device == "meta" else device, **options)

    product = torch.baddbmm

    def widening(acc: Tensor, x: Tensor, y: Tensor, **options: Any) -> Any:
        """As torch's on a GPU, which adds products of low precision to a float32 matrix."""
        if options.pop("out_dtype", None) is not None:
            x, y = (t.new_empty(t.shape, dtype=acc.dtype) for t in (x, y))
        return product(acc, x, y, **options)

    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with (
            torch.no_grad(),
            mock.patch.object(torch, "autocast", cuda),
            mock.patch.object(torch, "baddbmm", widening),
            mock.patch.object(_MULTIPLICATION, "_widens", lambda device: True),
            mock.patch("foldcp_kernels.core.dispatch._triton_runs", lambda device: True),
            no_driver(),
        ):
            yield
    finally:
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", dtype)


@contextmanager
def short_shapes() -> Iterator[None]:
    """Linear, LayerNorm, batched products and sums of like tensors skip torch's shape functions.

    On tensors that are shapes alone those are written in Python and take longer than any launch.
    """

    def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        return x.new_empty((*x.shape[:-1], len(w)))

    def layer_norm(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x.new_empty(x.shape)

    def same(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x.new_empty(x.shape)

    def of_like(plain: Any) -> Any:
        def made(x: Tensor, y: Any) -> Any:
            alike = isinstance(y, Tensor) and (x.shape, x.dtype) == (y.shape, y.dtype)
            return x.new_empty(x.shape) if alike else plain(x, y)

        return made

    def baddbmm(acc: Tensor, *_: Any, out: Tensor, **__: Any) -> Tensor:
        acc.new_empty(())
        return out

    functions = {"linear": linear, "layer_norm": layer_norm, "silu": same}
    methods = {name: of_like(getattr(Tensor, name)) for name in ("__mul__", "__add__")}
    with (
        mock.patch.multiple(torch.nn.functional, **functions),
        mock.patch.multiple(Tensor, sigmoid=same, **methods),
        mock.patch.object(torch, "baddbmm", baddbmm),
    ):
        yield
