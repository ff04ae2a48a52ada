"""Choose the implementation of an op, and log each choice once.

`reference` is the definition, `torch` runs anywhere, `triton` are the fused kernels,
`cuequivariance` NVIDIA's package for the two triangle ops. `auto` takes Triton on a GPU where the
kernel covers the input, else torch. A named implementation that cannot run raises.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import util
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from foldcp_kernels.core import trial
from foldcp_kernels.core.settings import SETTINGS
from foldcp_kernels.core.trial import cuequivariance

IMPLS = ("auto", "reference", "torch", "triton", "cuequivariance")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOG = logging.getLogger("foldcp.kernels")


def set_impl(name: str) -> None:
    """Set what ops run when their `impl` is None.

    Args:
        name: one of `IMPLS` but "reference".

    Raises:
        ValueError: the name is unknown, or names a package that cannot run.
    """
    if name not in IMPLS or name == "reference":
        allowed = ", ".join(x for x in IMPLS if x != "reference")
        raise ValueError(f"`impl` must be one of {allowed}, got {name!r}")
    if name == "triton" and util.find_spec(name) is None:
        raise ValueError(f"`impl` {name!r} needs the package {name}: install it or use auto")
    if name == "cuequivariance" and (why := cuequivariance.fault()):
        raise ValueError(f"`impl` {name!r} cannot run: {why}; or use auto")
    SETTINGS.impl = name


@contextmanager
def using(name: str) -> Iterator[None]:
    """Inside, run an implementation where a call names none; see `set_impl`, also for `Raises`.

    The default is one for all threads: `with` in one thread applies to the others, too.
    """
    before = SETTINGS.impl
    set_impl(name)
    try:
        yield
    finally:
        SETTINGS.impl = before


def default_impl() -> str:
    """Return the implementation that `set_impl` set, "auto" at first."""
    return SETTINGS.impl


def described(device: torch.device) -> str:
    """Name the default implementation on `device`, for the start line."""
    name = SETTINGS.impl
    return ("triton" if triton_runs(device) else "torch") if name == "auto" else name


def named(impl: str | None) -> str:
    """Return the implementation that a call names, or the default.

    Raises:
        ValueError: the name is unknown.
    """
    name = SETTINGS.impl if impl is None else impl
    if name not in IMPLS:
        raise ValueError(f"`impl` must be one of {', '.join(IMPLS)}, got {name!r}")
    return name


Reason = Callable[..., str | None]


def always(*_: Any) -> None:
    """Give no reason against a kernel."""


def choose(
    op: str,
    impl: str | None,
    x: Tensor,
    covers: Reason = always,
    prefers: Reason = always,
    dtype: torch.dtype | None = None,
) -> str:
    """Choose the implementation to run.

    Args:
        op: name of the op, for the log and for errors.
        impl: what the caller named; None for the default of `set_impl`.
        x: the op's main input.
        covers: returns why the Triton kernel cannot take this input ("`z` has dtype ..; expected
            .."), None where it can; asked only where Triton runs.
        prefers: returns why `auto` should not take the Triton kernel though it can run, None where
            it should.
        dtype: of what the kernel reads, for the log; None for that of `x`.

    Returns:
        "reference", "torch", "triton" or "cuequivariance".

    Raises:
        ValueError: a named implementation cannot run.
    """
    name = named(impl)
    if name in ("reference", "torch"):
        return name
    if name == "cuequivariance" and impl is not None:
        raise ValueError(f"{op}: cuequivariance does not have this op: use impl='auto'")
    if name == "triton":
        # As a default it stands for all ops, those that no kernel covers included; named in a
        # call it must run.
        refusal = covers()
        missing = _triton_missing(x) or (None if impl is None else refusal)
        if missing:
            raise ValueError(f"{op}: impl='triton' cannot run: {missing}")
        name = "torch" if refusal else "triton"
    else:
        runs = triton_runs(x.device)
        refusal = (covers() or prefers()) if runs else None
        name = "triton" if runs and refusal is None else "torch"
    _log(op, name, x.device.type, dtype or x.dtype, refusal)
    return name


@cache
def _log(op: str, name: str, device: str, dtype: torch.dtype, refusal: str | None) -> None:
    """Log a choice, the first time that it is made."""
    why = f" ({refusal})" if refusal and name == "torch" else ""
    LOG.info("%s on %s, %s: %s%s", op, device, dtype, name, why)


def triton_fault(device: torch.device) -> str | None:
    """Say why `auto` cannot take Triton's kernels on a device, None where it can.

    Args:
        device: where the ops run.

    Returns:
        One line: what is missing, and the remedy. A GPU is asked by a launch, once.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"the input is on {device.type}; expected a GPU"
    return trial.fault(device)


def triton_runs(device: torch.device) -> bool:
    """Tell whether `auto` may take Triton on a device."""
    if device.type != "cuda":
        return False
    if device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    return _gpu_runs(device)


@cache
def _gpu_runs(device: torch.device) -> bool:
    """Tell whether `auto` takes Triton on a GPU, and log once why it does not."""
    why = triton_fault(device)
    if why and torch.cuda.is_available():
        LOG.warning("torch in place of triton on %s: %s", device, why)
    return why is None


def _triton_missing(x: Tensor) -> str | None:
    if trial.package_fault():
        return trial.package_fault()
    if x.device.type == "meta" or isinstance(x, FakeTensor):
        return None
    if x.device.type == "cuda":
        why = trial.fault(x.device)
        return why and f"{why}; or use impl='torch'"
    from foldcp_kernels.core.triton_launch import INTERPRETED

    if INTERPRETED:
        return None
    return (
        f"the input is on {x.device.type}; expected cuda (or TRITON_INTERPRET=1): use impl='torch'"
    )


def check_dtype(x: Tensor, name: str) -> str | None:
    """Return the reason why the kernels cannot take a tensor's dtype, None where they can.

    Args:
        x: the tensor.
        name: of the argument, for the message.
    """
    return refused(x.dtype, name)


def refused(dtype: torch.dtype, name: str) -> str | None:
    """Return the reason why the kernels cannot take a dtype, None where they can.

    Args:
        dtype: of an argument.
        name: of the argument, for the message.
    """
    if dtype in KERNEL_DTYPES:
        return None
    return f"`{name}` has dtype {dtype}; expected float32, bfloat16 or float16"


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matrix products of `x`: autocast's, else its own."""
    if x.dtype != torch.float64 and autocasts(x):
        return torch.get_autocast_dtype(_autocast_device(x))
    return x.dtype


def autocasts(x: Tensor) -> bool:
    """Tell whether autocast is on where `x` is."""
    return torch.is_autocast_enabled(_autocast_device(x))


def _autocast_device(x: Tensor) -> str:
    return "cuda" if x.device.type == "meta" else x.device.type


@contextmanager
def products_in(form: str, device_type: str) -> Iterator[None]:
    """Compute the products within in a format; what they add up stays float32.

    Args:
        form: "fp32", as the process computes float32 products; "tf32", on tensor cores of GPUs that
            round operands to 10 bits; "bf16", by autocast.
        device_type: "cuda" or "cpu".
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    with torch.autocast(device_type, dtype=torch.bfloat16, enabled=form == "bf16"):
        try:
            if form == "tf32":
                matmul.allow_tf32 = True
            yield
        finally:
            if form == "tf32":
                matmul.allow_tf32 = before
