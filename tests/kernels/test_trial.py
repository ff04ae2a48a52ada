"""Whether Triton's kernels run is decided by launching one, and said where they do not."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from native import ROOT

from foldcp.boltz.command import preflight
from foldcp.cli.doctor import installed as doctor
from foldcp.config import Config
from foldcp.errors import UserError
from foldcp_kernels.core import dispatch, trial
from foldcp_kernels.core.extension import Extension

LACKS = "no C compiler: install gcc, or name one in CC"
GPU = torch.device("cuda", 0)


class Gpus:
    """GPUs that exist for `dispatch` alone; `faults` are what a launch on each one raises."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.launched: list[int] = []
        self.faults: dict[int, str] = {}
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(trial, "launch_on", self.launch)

    def launch(self, device: torch.device) -> str | None:
        self.launched.append(device.index)
        return self.faults.get(device.index)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpus]:
    """No launch that was decided before or inside the test counts for another one."""

    def forget() -> None:
        trial._trial.cache_clear()
        dispatch._gpu_runs.cache_clear()
        dispatch._log.cache_clear()
        dispatch.set_impl("auto")

    forget()
    yield Gpus(monkeypatch)
    forget()


def _on(index: int) -> Any:
    return SimpleNamespace(device=torch.device("cuda", index), dtype=torch.float32)


def test_a_launch_decides_once_per_gpu(gpus: Gpus, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "foldcp.kernels")
    gpus.faults[0] = LACKS
    for op in ("a", "b", "a"):
        assert dispatch.choose(op, None, _on(0)) == "torch"
        assert dispatch.choose(op, None, _on(1)) == "triton"
        assert dispatch.choose(op, None, torch.ones(1)) == "torch"
    assert dispatch.described(GPU) == dispatch.described(torch.device("cuda")) == "torch"
    assert gpus.launched == [0, 1]
    said = [r.getMessage() for r in caplog.records]
    assert said == [f"torch in place of triton on cuda:0: {LACKS}"]
    with pytest.raises(ValueError, match=f"a: impl='triton' cannot run: {LACKS}; or use impl='tor"):
        dispatch.choose("a", "triton", _on(0))
    dispatch.set_impl("triton")
    with pytest.raises(ValueError, match=LACKS):
        dispatch.choose("a", None, _on(0))
    assert dispatch.choose("a", None, _on(1)) == "triton"
    assert gpus.launched == [0, 1]


def test_triton_by_another_name(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pytorch-triton, or so broken that it does not import."""

    def unknown(name: str) -> str:
        raise trial.metadata.PackageNotFoundError(name)

    def broken(name: str) -> Any:
        raise ImportError("libtriton.so: undefined symbol")

    monkeypatch.setattr(trial.metadata, "version", unknown)
    try:
        trial.package_fault.cache_clear()
        assert trial.package_fault() is None and dispatch.choose("a", None, _on(0)) == "triton"
        assert doctor.kernels(1).startswith("triton 3.")
        trial.package_fault.cache_clear()
        monkeypatch.setattr(trial, "import_module", broken)
        with pytest.raises(ValueError, match="triton does not import .libtriton.so: .*: install"):
            dispatch.choose("a", "triton", _on(1))
    finally:
        trial.package_fault.cache_clear()


def test_nothing_is_launched_inside_a_capture(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert dispatch.choose("a", "triton", _on(0)) == "triton" and gpus.launched == []


def test_all_ranks_run_what_each_can(gpus: Gpus, capsys: pytest.CaptureFixture[str]) -> None:
    """Ranks of which one falls back alone would round differently, or refuse to go on."""
    answers: list[str | None] = [None, LACKS]
    session: Any = SimpleNamespace(gather=lambda mine: [mine, *answers[1:]], is_root=True)
    preflight.agree_on_kernels(Config(), torch.device("cpu"), session)
    assert dispatch.default_impl() == "auto" and gpus.launched == []
    preflight.agree_on_kernels(Config(), GPU, session)
    assert dispatch.default_impl() == "torch" and gpus.launched == [0]
    assert capsys.readouterr().err == f"foldcp: kernels torch, not triton: rank 1: {LACKS}\n"
    dispatch.set_impl("triton")
    with pytest.raises(UserError, match=f"FOLDCP_KERNELS=triton cannot run on rank 1: {LACKS}"):
        preflight.agree_on_kernels(Config(kernels="triton"), GPU, session)


def test_doctor_repeats_what_does_not_run(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.match(r"triton 3\S+, its trial kernel ran; \d+ of \d+ kernels", doctor.kernels(2))
    trial._trial.cache_clear()
    gpus.faults[1] = LACKS
    assert doctor.kernels(2) == f"torch (Triton does not run on GPU 1: {LACKS})"
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    plain = Extension(object(), line="for CPU; CUDA left out: nvcc was not found")
    monkeypatch.setattr("foldcp_kernels.core.extension.load", lambda: plain)
    assert doctor.transport(2) == "torch-nccl (torch.distributed; NCCL 2.28.9)"
    other = Extension(object(), "12.8", "12.0", "", "for CPU and CUDA 12.8 (12.0)")
    monkeypatch.setattr("foldcp_kernels.core.extension.load", lambda: other)
    unused = "the extension cannot be used, it is for 12.0, the GPU is sm_90: "
    assert doctor.transport(2).startswith(f"torch-nccl (torch.distributed; NCCL 2.28.9): {unused}")


def test_the_trial_kernel_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted here; a device on which it does something else is not trusted."""
    from foldcp_kernels.core.trial import kernel

    assert trial.launch_on(torch.device("cpu")) is None
    monkeypatch.setattr(kernel, "run", lambda x, out: out.fill_(1))
    assert "computed wrong numbers" in trial.launch_on(torch.device("cpu"))

    def full(x: torch.Tensor, out: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kernel, "run", full)
    with pytest.raises(torch.OutOfMemoryError):  # says nothing about Triton
        trial.launch_on(torch.device("cpu"))


WITHOUT = """
import contextlib, os, sysconfig, torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *a: (8, 0)
torch.cuda.current_device = lambda: 0
torch._C._cuda_getCurrentRawStream = lambda device: 0
from foldcp_kernels.core import trial
def answer(**environ):
    os.environ.update(environ)
    print(trial.launch_on(torch.device("cpu")))
tools = os.environ["PATH"]
answer(CC="/nowhere/gcc")
del os.environ["CC"]
answer(PATH="/nowhere")
answer(PATH=tools, CC="false")
paths = sysconfig.get_paths
sysconfig.get_paths = lambda *a, **k: paths(*a, **k) | {"include": "/nowhere/include"}
answer(CC="gcc")
answer(TRITON_CACHE_DIR="/proc/nowhere")
"""


@pytest.mark.process
def test_what_a_launch_of_triton_lacks(tmp_path: Path) -> None:
    """Triton itself, up to where it asks for the driver, on machines without its tools."""
    environ = {k: v for k, v in os.environ.items() if k not in ("CC", "TRITON_INTERPRET")}
    # It is told where the driver is, so that it goes on to compile.
    environ |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_LIBCUDA_PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, env=environ, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    no_cc, no_path, broken, headers, cache = done.stdout.splitlines()
    assert no_cc == no_path == LACKS
    assert broken == "the C compiler false failed: its message is above; repair it, or set CC"
    assert headers == "no Python.h in /nowhere/include: install python3-dev"
    assert cache.startswith("its cache fails ([Errno 2] ") and "TRITON_CACHE_DIR" in cache


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (AssertionError("libcuda.so cannot found!\n"), "no libcuda.so.1: name its folder in TRI"),
        (ImportError("libcuda.so.1: cannot open shared object file"), "no libcuda.so.1: name "),
        (FileNotFoundError(2, "No such file", "/sbin/ldconfig"), "no libcuda.so.1: name its "),
        (RuntimeError("Cannot find ptxas"), "ptxas failed (Cannot find ptxas): install the tri"),
        (RuntimeError("PTXAS error: x\ny"), "ptxas failed (PTXAS error: x y): install the tr"),
        (OSError(28, "No space left on device"), "its cache fails ([Errno 28] No space left on "),
        (ImportError("a.so: failed to map segment from shared object"), "its cache fails (a.so: "),
        (RuntimeError("what\nelse"), "RuntimeError: what else: install the triton that your "),
        (SystemError(), "SystemError: install the triton"),
    ],
)
def test_what_it_lacks_is_one_line_with_a_remedy(error: Exception, said: str) -> None:
    line = trial.explain(error)
    assert line.startswith(said) and "\n" not in line
