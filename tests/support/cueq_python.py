"""Load the real Python of NVIDIA's cuEquivariance on a CPU, with its compiled part replaced.

`make cueq-python` installs the packages into a folder of their own, so that no other test finds
them. Of the compiled part there is the attention kernel in torch, with the demands that the kernel
makes on what it is handed, and what zeroes lines without a key; any other function raises.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from foldcp_kernels.core.dispatch import set_impl
from foldcp_kernels.core.trial import cuequivariance as trial
from foldcp_kernels.triangle_attention import cuequivariance as ours

FOLDER = Path(sys.prefix, "cuequivariance")
_ROOMS = {"cuequivariance", "cuequivariance_ops"}
_ROOMS |= {f"{name}_torch" for name in _ROOMS}
_EXTENSION = "cuequivariance_ops_torch._ext"
_OP = "cuequivariance::triangle_attention"


@dataclass
class Launch:
    """One launch of the attention kernel: what it was handed."""

    chip: tuple[int, int]
    low_bias: bool
    bias: Tensor
    keys: int
    mask: Tensor | None
    lengths: Tensor | None


@dataclass
class Peer:
    """The real package, and what its kernels were asked for.

    Args:
        package: `cuequivariance_torch`.
        attention: the module that chooses an attention kernel.
        multiplication: the module that chooses the kernels of triangle multiplication.
        modules: of all packages, by name.
        launches: of the attention kernel, in order.
    """

    package: Any
    attention: Any
    multiplication: Any
    modules: dict[str, Any]
    launches: list[Launch] = field(default_factory=list)


class _Compiled(types.ModuleType):
    """Stand in for the extension: kernels are of every chip, and none but attention runs."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.startswith("has_"):
            return lambda *_: True

        def missing(*_: Any, **__: Any) -> None:
            raise NotImplementedError(f"the compiled function {name} has no stand-in")

        return missing


def _kernel(peer: Peer) -> Any:
    """Make the attention kernel: `o`, `lse` and `largest` are written."""

    def attention(
        o: Tensor, lse: Tensor, largest: Tensor, q: Tensor, k: Tensor, v: Tensor,
        mask: Tensor | None, lengths: Tensor | None, bias: Tensor, scale: float,
        _tf32: bool, chip: list[int], _stream: int,
    ) -> None:  # fmt: skip
        low = bias.dtype == q.dtype != torch.float32
        direct = tuple(chip) in ((10, 0), (10, 3), (12, 0)) and low
        assert bias.dtype == torch.float32 or direct, "the sm_80 kernel reads the bias in float32"
        assert bias.is_contiguous() and bias.shape == (len(q), 1, *q.shape[2:4], k.shape[3])
        if direct:
            assert k.shape[3] % 8 == 0 and (tuple(chip) == (12, 0) or mask is None)
            assert all(s * 2 % 16 == 0 for x in (q, k, v) for s in x.stride()[:4])
        else:
            assert all(x.is_contiguous() for x in (q, k, v)) and lengths is None
        peer.launches.append(Launch(tuple(chip), low, bias, k.shape[3], mask, lengths))
        logits = q.double() @ k.double().mT * scale + bias.double()
        keep = torch.ones((*q.shape[:2], 1, 1, k.shape[3]), dtype=torch.bool)
        keep = keep if mask is None else mask
        if lengths is not None:
            keep = torch.arange(k.shape[3]) < lengths.view(*q.shape[:2], 1, 1, 1)
        logits = logits.masked_fill(~keep, -torch.inf)
        o.copy_(logits.softmax(-1).nan_to_num() @ v.double())
        lse.copy_(logits.logsumexp(-1))
        largest.copy_(logits.amax(-1))

    return attention


def _zero_rows(o: Tensor, lse: Tensor, largest: Tensor, lengths: Tensor, _stream: int) -> None:
    for x in (o, lse, largest):
        x[lengths == 0] = 0


def _packages() -> Iterator[str]:
    """Yield the names of the package's modules that are imported."""
    yield from (name for name in list(sys.modules) if name.partition(".")[0] in _ROOMS)


@cache
def _load() -> Peer:
    """Import the packages, once in a process: their operators are registered with torch."""
    whole, inner = _Compiled(_EXTENSION), _Compiled(f"{_EXTENSION}.cuequivariance_ops_torch_ext")
    whole.__path__ = []
    whole.cuequivariance_ops_torch_ext = inner
    sys.modules |= {_EXTENSION: whole, inner.__name__: inner}
    sys.path.insert(0, str(FOLDER))
    environ = {name: value for name, value in os.environ.items() if not name.startswith("CUEQ_")}
    environ["CUEQ_TRITON_CACHE_DIR"] = str(FOLDER / "cache")
    try:
        # It complains that the library it loads is not there, and sets the filters of warnings.
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
            mock.patch.dict(os.environ, environ, clear=True),
        ):
            package = importlib.import_module("cuequivariance_torch")
            rooms = [
                importlib.import_module(f"cuequivariance_ops_torch.{name}")
                for name in ("triangle_attention", "triangle_multiplicative_update")
            ]
    finally:
        sys.path.remove(str(FOLDER))
    modules = {name: sys.modules.pop(name) for name in _packages()}
    peer = Peer(package, *rooms, modules)
    whole.triangle_attention = _kernel(peer)
    whole.zero_invalid_triangle_attention_rows = _zero_rows
    definition = torch._library.custom_ops.OPDEFS[_OP]
    definition.register_kernel("cpu")(definition._backend_fns["cuda"])
    return peer


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    """The package, importable during a test; the chip is sm_90 until `on_chip` says another."""
    if not (FOLDER / "cuequivariance_ops_torch").is_dir():
        pytest.skip("cuEquivariance's Python is not installed: make cueq-python")
    found = _load()
    found.launches.clear()
    for name, module in found.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    nothing = types.SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: nothing)
    for name in ("range_push", "range_pop"):
        monkeypatch.setattr(torch.cuda.nvtx, name, lambda *_: None)
    on_chip(found, (9, 0), monkeypatch)
    trial.fault.cache_clear()
    yield found
    trial.fault.cache_clear()
    set_impl("auto")


def on_chip(peer: Peer, chip: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the package and our backend find another GPU.

    Args:
        peer: the package.
        chip: its compute capability.
        monkeypatch: of the test.
    """
    monkeypatch.setattr(ours, "_chip", lambda _: chip)
    monkeypatch.setattr(peer.attention, "_get_device_cc", lambda _: list(chip))
