"""The compiled extension: what it needs of the system, and how it builds."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch
from native import ROOT, SOURCES, compile_shared
from torch.utils import cpp_extension

from bench import native as resources

LIBRARY = ROOT / "foldcp_kernels/_C.abi3.so"
OLDEST_TORCH = "0x020b000000000000"
# torch 2.13's header declares these for every version, but 2.11 has them under other names only.
NOT_IN_OLDEST = {"aoti_torch_dtype_float4_e2m1fn_x2", "aoti_torch_dtype_float8_e8m0fnu"}
PYTHON = {"PyModule_Create2"}  # of the limited interface since 3.2
NEEDED = {
    "libtorch_cpu.so",
    "libtorch.so",
    "libstdc++.so.6",
    "libm.so.6",
    "libgcc_s.so.1",
    "libc.so.6",
    "libdl.so.2",
    "libpthread.so.0",
    "librt.so.1",
    "ld-linux-x86-64.so.2",
    "ld-linux-aarch64.so.1",
}


def _symbols(*options: str) -> list[tuple[str, str]]:
    """(kind, name@VERSION) of dynamic symbols."""
    done = subprocess.run(
        ["nm", "-D", *options, str(LIBRARY)], capture_output=True, text=True, check=True
    )
    return [tuple(line.split()[-2:]) for line in done.stdout.splitlines()]


def _declared() -> set[str]:
    """Functions of torch's C interface in the oldest version that is supported."""
    include = Path(torch.__file__).parent / "include"
    command = ["g++", "-E", "-x", "c++", f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}", "-"]
    done = subprocess.run(
        [*command, f"-I{include}"], input="#include <torch/csrc/stable/c/shim.h>\n",
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(re.findall(r"\b((?:aoti_torch|torch)_\w+)\(", done.stdout)) - NOT_IN_OLDEST


def test_needs_only_stable_interfaces() -> None:
    allowed = _declared() | PYTHON
    strange = []
    for kind, symbol in _symbols("--undefined-only"):
        name, _, version = symbol.partition("@")
        # Of the C++ library only what has its version: other libraries export copies without one.
        system = re.match(r"(GLIBC|GLIBCXX|CXXABI|GCC)_", version)
        if kind != "w" and not system and name not in allowed:
            strange.append(symbol)
    assert not strange
    # Not even by the way: what it exports could replace functions of torch's CUDA runtime.
    exported = {name for kind, name in _symbols("--defined-only") if kind == "T"}
    assert exported == {"PyInit__C"}


def test_needed_libraries_and_their_versions() -> None:
    dynamic = subprocess.run(
        ["readelf", "-dW", str(LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    assert "libtorch_cpu.so" in needed and needed <= NEEDED
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    newest: dict[str, tuple[int, ...]] = {}
    for _, symbol in _symbols("--undefined-only"):
        found = re.search(r"@(GLIBC|GLIBCXX|CXXABI)_([\d.]+)$", symbol)
        if found:
            version = tuple(int(n) for n in found[2].split("."))
            newest[found[1]] = max(newest.get(found[1], ()), version)
    # They follow from the compiler that built it; manylinux_2_28 would be 2.28 and 3.4.25.
    print("newest versions needed:", newest)
    assert set(newest) == {"GLIBC", "GLIBCXX", "CXXABI"}


def _run(code: str, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environ}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_loads_without_gpu_driver_and_nccl() -> None:
    assert LIBRARY.name == "_C.abi3.so"
    said = _run(
        "from foldcp_kernels.extension import load\n"
        "print(load().ops.build_info())\n"
        "print([m for m in open('/proc/self/maps') if 'libcuda' in m or 'nccl' in m])",
        CUDA_VISIBLE_DEVICES="",
    )
    first, second = said.splitlines()
    assert first.startswith("foldcp 0.1.0") and second == "[]"


@pytest.mark.skipif(resources.find_nvcc() is None, reason="no nvcc")
def test_kernels_fit_every_chip() -> None:
    for chip in resources.CHIPS:
        rows = resources.compile_for(chip)
        kinds = Counter(row["kernel"].partition("<")[0] for row in rows)
        assert kinds == {"copy_words": 10, "encode": 4, "decode": 4}
        for row in rows:
            print(row)
            assert row["chip"] == f"sm_{chip}" and row["registers"] > 0
            assert not resources.problems(row), row


@pytest.mark.skipif(resources.find_nvcc() is None, reason="no nvcc")
def test_resource_report_sees_spills(tmp_path: Path) -> None:
    source = tmp_path / "bad.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024) bad(float* x, int n) {\n"
        "  float held[100];\n"
        "  for (int i = 0; i < 100; ++i) held[i] = x[i];\n"
        "  for (int i = 0; i < n; ++i) held[int(x[i]) % 100] += held[i % 100];\n"
        "  for (int i = 0; i < 100; ++i) x[i] = held[i];\n"
        "}\n"
        "__global__ void good(float* x) { __shared__ float y[64]; y[threadIdx.x] = *x;\n"
        "  __syncthreads(); x[threadIdx.x] = y[63 - threadIdx.x]; }\n"
    )
    good, bad = sorted(resources.compile_for("80", source), key=lambda r: r["stack"])
    assert resources.problems(good) == [] and good["shared"] == 256
    assert "400 bytes of stack" in resources.problems(bad)
    assert resources.problems(good | {"spills": 4}) == ["4 bytes of spills"]
    assert resources.problems(good | {"registers": 48}) == ["48 registers"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what setup.py needs: it writes into its folder."""
    folder = tmp_path_factory.mktemp("build")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "foldcp.pth"):
        shutil.copy(ROOT / name, folder)
    leave = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.py")
    for name in ("csrc", "foldcp_kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=leave)
    return folder


HOST_EXCHANGE = """
import sys
import torch
from foldcp_kernels.extension import load
found = load()
assert found.ops is not None, found.why
assert not found.cuda and found.why == "FOLDCP_BUILD_CUDA=0", found
ops = found.ops
print(ops.build_info())
first = ops.host_open(0, 2, 2, 4096, "", 20.0)
second = ops.host_open(1, 2, 2, 4096, f"/proc/self/fd/{ops.host_descriptor(first)}", 20.0)
staging = torch.zeros(1 << 16, dtype=torch.uint8), torch.zeros(1 << 16, dtype=torch.uint8)
x = [torch.randn(50, 40).t(), torch.randn(50, 40).t()]
y = [torch.zeros(40, 50), torch.zeros(40, 50)]
flights = [ops.flight_open(e) for e in (first, second)]
for i, e in enumerate((first, second)):
    peer = [1 - i]
    ops.flight_post(e, flights[i], 0, [x[i]], peer, [0], [y[i]], peer, [0], staging[i], 1)
for i, e in enumerate((first, second)):
    ops.flight_arrive(e, flights[i], 0)
    ops.flight_land(e, flights[i])
assert torch.equal(y[0], x[1]) and torch.equal(y[1], x[0])
library = sys.argv[1]
for call in (
    lambda: ops.copy_window(0, 0, 2, 4096),
    lambda: ops.copy_handle(1),
    lambda: ops.copy_open(1, "", 2, 1.0),
    lambda: ops.nccl_open(library, 0, 0, 2, 2, ops.nccl_unique_id(library), "", "", 0, 1.0),
):
    try:
        call()
    except RuntimeError as error:
        assert str(error) == "foldcp was built without CUDA", error
    else:
        raise AssertionError("no error")
"""


def test_builds_without_cuda(copy: Path, tmp_path: Path) -> None:
    environ = {**os.environ, "FOLDCP_BUILD_CUDA": "0", "MAX_JOBS": "2", "PYTHONPATH": str(copy)}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=copy, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "foldcp: compiled part: extension for CPU (FOLDCP_BUILD_CUDA=0)" in done.stderr
    library = compile_shared(SOURCES / "mock_nccl.cpp", tmp_path / "libmock_nccl.so")
    command = [sys.executable, "-c", HOST_EXCHANGE, str(library)]
    done = subprocess.run(command, cwd=copy, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "foldcp 0.1.0 without cuda\n"


class Setup:
    """Runs setup.py of a copy in this process, up to the call of setuptools.

    Args:
        copy: the folder. monkeypatch: pytest's.
    """

    def __init__(self, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.copy, self.patch = copy, monkeypatch
        self.asked: dict[str, Any] = {}
        monkeypatch.setattr(setuptools, "setup", lambda **asked: self.asked.update(asked))
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
        for variable in ("FOLDCP_BUILD_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
            monkeypatch.delenv(variable, raising=False)

    def run(self) -> dict[str, Any]:
        """Returns the script's names."""
        return runpy.run_path(str(self.copy / "setup.py"))

    def built(self) -> dict[str, Any]:
        """What it left for foldcp_kernels.extension."""
        return runpy.run_path(str(self.copy / "foldcp_kernels/_build_info.py"))["BUILD"]


@pytest.fixture
def build(copy: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    """setup.py without the variables that steer it."""
    return Setup(copy, monkeypatch)


def test_without_nvcc(build: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    build.patch.setattr(shutil, "which", lambda *a, **k: None)
    build.run()
    assert "extension for CPU (nvcc was not found at build time)" in capsys.readouterr().err
    (extension,) = build.asked["ext_modules"]
    assert not [s for s in extension.sources if "cuda" in s or s.endswith(".cu")]
    assert build.built()["why"] == "nvcc was not found at build time"
    build.patch.setenv("FOLDCP_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match="FOLDCP_BUILD_CUDA=1, but nvcc was not found: set CUDA_H"):
        build.run()


def test_without_torch(build: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    build.patch.setitem(sys.modules, "torch", None)
    build.run()
    why = "torch was not there at build time: install with --no-build-isolation"
    assert f"foldcp: compiled part: none: {why}" in capsys.readouterr().err
    assert build.asked["ext_modules"] == [] and build.asked["options"] == {}
    assert not build.built()["built"] and build.built()["why"] == why
    build.patch.setenv("FOLDCP_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match=f"FOLDCP_BUILD_CUDA=1, but {why}"):
        build.run()
    build.patch.setenv("FOLDCP_BUILD_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be 0, 1 or unset, got 'yes'"):
        build.run()


@pytest.mark.skipif(resources.find_nvcc() is None, reason="no nvcc")
def test_chips_of_the_environment(build: Setup) -> None:
    build.patch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0a;12.0+PTX")
    names = build.run()
    (extension,) = build.asked["ext_modules"]
    chips = [a for a in extension.extra_compile_args["nvcc"] if a.startswith("-gencode")]
    assert chips == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    assert build.built()["chips"] == "8.0 9.0a;12.0+PTX"
    assert names["OLDEST_TORCH"] == OLDEST_TORCH
    build.patch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST has 'Hopper'; write it like 8.0"):
        build.run()
