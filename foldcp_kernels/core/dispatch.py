"""Choose the implementation of an op, once per op and kind of input, and log it once.

`reference` is the definition, `torch` runs anywhere, `triton` are the fused kernels,
`cuequivariance` NVIDIA's package for the two triangle ops. `auto` takes Triton on a GPU where the
kernel covers the input, else torch. A named implementation that cannot run raises.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import util
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakIdKeyDictionary

from foldcp_kernels.core import trial

IMPLS = ("auto", "reference", "torch", "triton", "cuequivariance")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOG = logging.getLogger("foldcp.kernels")

_default = ["auto"]
_chosen: set[tuple[Any, ...]] = set()
_runs: dict[torch.device, bool] = {}  # whether `auto` takes Triton there
_derived: Any = WeakIdKeyDictionary()
_deriving: list[Callable[..., Any]] = []


def set_impl(name: str) -> None:
    """Set what ops run when their `impl` is None.

    Args:
        name: one of `IMPLS` but "reference".

    Raises:
        ValueError: the name is unknown, or names a package that is not installed.
    """
    if name not in IMPLS or name == "reference":
        allowed = ", ".join(x for x in IMPLS if x != "reference")
        raise ValueError(f"`impl` must be one of {allowed}, got {name!r}")
    packages = {"triton": "triton", "cuequivariance": "cuequivariance_torch"}
    package = packages.get(name)
    if package and util.find_spec(package) is None:
        raise ValueError(f"`impl` {name!r} needs the package {package}: install it or use auto")
    _default[0] = name


def default_impl() -> str:
    """Return the implementation that `set_impl` set, "auto" at first."""
    return _default[0]


def described(device: torch.device) -> str:
    """Name the default implementation on `device`, for the start line."""
    name = _default[0]
    return ("triton" if _triton_runs(device) else "torch") if name == "auto" else name


def choose(
    op: str,
    impl: str | None,
    x: Tensor,
    refusal: str | None = None,
    slow: str | None = None,
    peer: bool = False,
) -> str:
    """Choose the implementation to run.

    Args:
        op: name of the op, for the log and for errors.
        impl: what the caller named; None for the default of `set_impl`.
        x: the op's main input.
        refusal: why the Triton kernel cannot take this input ("`z` has dtype ..; expected .."),
            None where it can.
        slow: why `auto` should not take the Triton kernel though it can run, None where it should.
        peer: whether cuEquivariance has this op.

    Returns:
        "reference", "torch", "triton" or "cuequivariance".

    Raises:
        ValueError: a named implementation cannot run.
    """
    name = _default[0] if impl is None else impl
    if name not in IMPLS:
        raise ValueError(f"`impl` must be one of {', '.join(IMPLS)}, got {name!r}")
    if name in ("reference", "torch"):
        return name
    if name == "cuequivariance" and peer:
        return name
    if name == "cuequivariance" and impl is not None:
        raise ValueError(f"{op}: cuequivariance does not have this op: use impl='auto'")
    if name == "triton":
        # As a default it stands for all ops, those that no kernel covers included; named in a
        # call it must run.
        missing = _triton_missing(x) or (None if impl is None else refusal)
        if missing:
            raise ValueError(f"{op}: impl='triton' cannot run: {missing}")
        name = "torch" if refusal else "triton"
    else:
        refusal = refusal or slow
        name = "triton" if refusal is None and _triton_runs(x.device) else "torch"
    key = (op, name, x.device.type, x.dtype, refusal)
    if key not in _chosen:
        _chosen.add(key)
        why = f" ({refusal})" if refusal and name == "torch" else ""
        LOG.info("%s on %s, %s: %s%s", op, x.device.type, x.dtype, name, why)
    return name


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


def _triton_runs(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    known = _runs.get(device)
    if known is None:
        there = torch.cuda.is_available()
        if there and device.index is None:
            return _triton_runs(torch.device("cuda", torch.cuda.current_device()))
        why = triton_fault(device)
        known = _runs[device] = why is None
        if there and why:
            LOG.warning("torch in place of triton on %s: %s", device, why)
    return known


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
    if x.dtype in KERNEL_DTYPES:
        return None
    return f"`{name}` has dtype {x.dtype}; expected float32, bfloat16 or float16"


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
def deriving(make: Callable[..., Any] | None) -> Iterator[None]:
    """Inside, make `derived` return what `make(name, tensors, build, key)` does."""
    before, _deriving[:] = list(_deriving), [] if make is None else [make]
    try:
        yield
    finally:
        _deriving[:] = before


def derived(
    name: str,
    tensors: Sequence[Tensor],
    build: Callable[..., Any],
    *key: Any,
) -> Any:
    """Return `build(*tensors)`, kept while the tensors live and stay as they are.

    Kernels take weights in the compute dtype and sometimes stacked; this makes that once.

    Args:
        name: what is built.
        tensors: parameters.
        build: called with them, without gradient.
        key: what else the result depends on (the dtype, for example).
    """
    if _deriving:
        return _deriving[-1](name, tuple(tensors), build, key)
    first = tensors[0]
    versions = tuple((id(x), 0 if x.is_inference() else x._version) for x in tensors)
    held = _derived.get(first)
    if held is None:
        held = _derived[first] = {}
    found = held.get((name, *key))
    if found is None or found[0] != versions:
        with torch.no_grad(), torch.autocast(_autocast_device(first), enabled=False):
            found = (versions, build(*tensors))
        if found[1] is first:  # an entry that holds its own key would never be freed
            return first
        held[(name, *key)] = found
    return found[1]
