"""The compiled extension: what it needs of the system, and how it builds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from native import ROOT, SOURCES, compile_shared
from test_toolchain import CHIPS_13, stub, stub_toolkit

from bench import native as resources
from foldcp import __version__
from foldcp_kernels.core import extension

LIBRARY = ROOT / "foldcp_kernels/_C.abi3.so"
OLDEST_TORCH = "0x{:02x}{:02x}000000000000".format(*extension.OLDEST_TORCH)
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
        "from foldcp_kernels.core.extension import load\n"
        "print(load().ops.build_info())\n"
        "print([m for m in open('/proc/self/maps') if 'libcuda' in m or 'nccl' in m])",
        CUDA_VISIBLE_DEVICES="",
    )
    first, second = said.splitlines()
    assert first.startswith(f"foldcp {__version__}") and second == "[]"


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
    for name in ("setup.py", "toolchain.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copy(ROOT / "foldcp.pth", folder)
    (folder / "foldcp").mkdir()
    shutil.copy(ROOT / "foldcp/_version.py", folder / "foldcp")
    leave = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.py")
    for name in ("csrc", "foldcp_kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=leave)
    return folder


HOST_EXCHANGE = """
import sys
import torch
from foldcp_kernels.core.extension import load
found = load()
assert found.ops is not None, found.why
assert not found.cuda and found.missing(torch.device("cpu")) is None, found
assert found.missing(torch.device("cuda")) == f"it is {found.line}"
print(found.described())
ops = found.ops
print(ops.build_info())
first = ops.host_open(0, 2, 4096, "", 20.0)
second = ops.host_open(1, 2, 4096, f"/proc/self/fd/{ops.host_descriptor(first)}", 20.0)
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
    lambda: ops.copy_open(1, "", 1.0),
    lambda: ops.nccl_open(library, 0, 0, 2, ops.nccl_unique_id(library), 0, 1.0),
):
    try:
        call()
    except RuntimeError as error:
        assert str(error) == "foldcp was built without CUDA", error
    else:
        raise AssertionError("no error")
"""


def _setup(copy: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Runs setup.py of a copy with a toolkit whose compiler dies."""
    toolkit = copy / "cuda"
    if not toolkit.is_dir():
        stub_toolkit(toolkit, "13.0", CHIPS_13)
    environ = {**os.environ, "MAX_JOBS": "2", "CUDA_HOME": str(toolkit), **environ}
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=copy, env=environ, capture_output=True, text=True)


def _told(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What was built, as said first, then after failures."""
    return re.findall(r"^foldcp: compiled part: (.*)$", done.stderr, re.M)


def test_goes_on_without_the_cuda_part(copy: Path, tmp_path: Path) -> None:
    """The toolkit looks whole and dies at the first file; the CPU part is built and works."""
    done = _setup(copy, "build_ext", "--inplace")
    assert done.returncode == 0, done.stderr
    first, last = _told(done)
    assert first.startswith("for CPU and CUDA 13.0 (")
    assert re.fullmatch(r"for CPU; CUDA left out: it did not compile: .*\berror\b.*", last)
    library = compile_shared(SOURCES / "mock_nccl.cpp", tmp_path / "libmock_nccl.so")
    command = [sys.executable, "-c", HOST_EXCHANGE, str(library)]
    environ = {**os.environ, "PYTHONPATH": str(copy)}
    done = subprocess.run(command, cwd=copy, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{last}\nfoldcp {__version__} without cuda\n"


def test_goes_on_without_any_part(copy: Path) -> None:
    """A C++ compiler that checks code and writes none: a wheel is made, and says so."""
    real, full = shutil.which("g++"), "x.cpp:1: fatal error: No space left on device"
    dies = f"""case "$*" in *-fsyntax-only*|*-dump*|--version) exec {real} "$@";; esac
    echo '{full}' >&2; exit 1"""
    broken = {"CXX": str(stub(copy / "bin", "c++", dies)), "CC": str(copy / "bin" / "c++")}
    done = _setup(copy, "bdist_wheel", **broken)
    assert done.returncode == 0, done.stderr
    assert _told(done)[1:] == [
        f"for CPU; CUDA left out: it did not compile: {full}",
        f"none: the C++ part did not compile: {full}",
    ]
    (wheel,) = (copy / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        assert not [name for name in files.namelist() if name.endswith(".so")]
        (info,) = (name for name in files.namelist() if name.endswith("_build_info.py"))
        info = files.read(info).decode()
    assert f"'line': 'none: the C++ part did not compile: {full}'" in info
    done = _setup(copy, "build_ext", FOLDCP_BUILD_CUDA="1", **broken)
    said = f"foldcp: FOLDCP_BUILD_CUDA=1, but it did not compile: {full}"
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == said


@pytest.mark.parametrize(
    ("chips", "runs", "not_there"),
    [
        ("8.0+PTX;9.0a;10.0a;12.0+PTX", (80, 86, 89, 90, 100, 103, 110, 121, 200), (70, 75)),
        ("8.0;9.0a", (80, 86, 89, 90), (75, 100, 120)),
        ("8.9;9.0a+PTX", (89, 90, 100), (80, 86)),
        ("10.0f 12.0", (100, 103, 120, 121), (90, 110)),
    ],
)
def test_which_gpus_a_list_of_chips_covers(
    chips: str, runs: tuple[int, ...], not_there: tuple[int, ...]
) -> None:
    assert [chip for chip in (*runs, *not_there) if extension.covers(chips, chip)] == [*runs]


def test_says_why_it_cannot_serve_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One built for a newer CUDA than the driver runs, or for other chips, is not used."""
    gpu, driver = torch.device("cuda", 0), [13000]
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver[0], raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    built = extension.Extension(object(), "13.0", "9.0a", "", "for CPU and CUDA 13.0 (9.0a)")
    assert built.missing(gpu) is None and built.missing(torch.device("cpu")) is None
    driver[0] = 12080
    assert "for CUDA 13.0, the driver runs CUDA 12.8: update the driver" in built.missing(gpu)
    assert replace(built, cuda="12.4").missing(gpu) is None
    other = replace(built, cuda="12.4", chips="8.0")
    assert "for 8.0, the GPU is sm_90: set TORCH_CUDA_ARCH_LIST to 9.0+PTX" in other.missing(gpu)
    assert replace(built, ops=None, why="no torch").missing(torch.device("cpu")) == "no torch"
