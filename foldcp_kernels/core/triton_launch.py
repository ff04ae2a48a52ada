"""The only place that launches a Triton kernel: on a GPU, in the interpreter, or just compiled.

`compile_for` makes launchers compile what they would launch, for any chip and without a GPU: hand
them tensors on the "meta" device. On fake tensors (FakeTensorMode) nothing is launched either, so
that live memory can be counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from triton.backends.compiler import GPUTarget

INTERPRETED = bool(triton.knobs.runtime.interpret)


class Compiled:
    """One kernel as compiled for one chip.

    Args:
        name: of the kernel.
        options: constant arguments and launch options, as text.
        kernel: Triton's compiled kernel (`asm`, `metadata`).
    """

    def __init__(self, name: str, options: str, kernel: Any) -> None:
        self.name, self.options, self.kernel = name, options, kernel


class Launcher:
    """Hold what becomes of launches: they run, or inside `compile_for` are compiled alone.

    The driver of Triton, which `compile_for` replaces, belongs to the process, and so does this.
    """

    def __init__(self) -> None:
        self.compiles_for: int | None = None
        self.found: list[Compiled] = []


_LAUNCHER = Launcher()


class _Chip:
    """Stands for Triton's driver where there is no GPU."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compile_for(capability: int) -> Iterator[list[Compiled]]:
    """Compile for a chip instead of launching.

    Args:
        capability: compute capability as a number, 90 for sm_90.

    Returns:
        A list that fills with what the launchers called inside compile.

    Raises:
        RuntimeError: Triton interprets (TRITON_INTERPRET=1), so nothing can be compiled.
    """
    if INTERPRETED:
        raise RuntimeError("kernels are interpreted: unset TRITON_INTERPRET to compile them")
    here, driver = _LAUNCHER, triton.runtime.driver
    before = here.compiles_for, here.found
    active = driver._active  # asking for the active driver fails where there is none
    driver.set_active(_Chip(capability))
    here.compiles_for, here.found = capability, []
    try:
        yield here.found
    finally:
        here.compiles_for, here.found = before
        driver._active = active


def capability(device: torch.device) -> int:
    """Return the chip that kernels are configured for: 90 for sm_90; 0 in the interpreter."""
    if _LAUNCHER.compiles_for is not None:
        return _LAUNCHER.compiles_for
    if device.type == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    return 0


def packed(*vectors: Tensor | None) -> Iterator[Tensor | None]:
    """Pack gains, shifts and biases as kernels read them: elements next to each other."""
    return (None if x is None else x.contiguous() for x in vectors)


def cdiv(n: int, size: int) -> int:
    """Count the blocks that n elements make; Triton's own takes 10 us of the host.

    Args:
        n: elements.
        size: of a block.
    """
    return -(-n // size)


def next_power_of_2(n: int) -> int:
    """Return the least power of 2 that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel.

    Args:
        kernel: a `triton.jit` function.
        grid: programs along up to three axes; none when empty.
        args: its arguments.
        options: its constants, `num_warps`, `num_stages`.

    Raises:
        ValueError: a bfloat16 tensor under the interpreter, whose bfloat16 `tl.dot` is wrong.
    """
    if 0 in grid:
        return
    tensors = [x for x in args if isinstance(x, Tensor)]
    if _LAUNCHER.compiles_for is not None:
        compiled = kernel.run(*args, grid=grid, warmup=True, **options)
        constants = ", ".join(f"{k}={v}" for k, v in options.items() if k != "eps")
        _LAUNCHER.found.append(Compiled(kernel.__name__.strip("_"), constants, compiled))
        return
    if any(isinstance(x, FakeTensor) for x in tensors):
        return
    if INTERPRETED and any(x.dtype == torch.bfloat16 for x in tensors):
        raise ValueError(
            f"`{kernel.__name__}` got bfloat16 under TRITON_INTERPRET=1, which computes bfloat16 "
            "dots wrong: pass float32 or float16"
        )
    device = tensors[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)
