"""What setup.py decides to build: a table of toolchains, and stub tools on PATH."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import toolchain  # noqa: E402
from toolchain import Facts, Plan, Refused, decide, fall_back, first_error, gencode  # noqa: E402

CHIPS_12 = (50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90)
CHIPS_13 = (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)
ALL = "8.0+PTX;9.0a;10.0a;12.0+PTX"
GOOD = Facts(torch="2.11.0+cu130", torch_cuda="13.0", nvcc="13.0", known=CHIPS_13)
OLD = {"nvcc": "12.4", "known": CHIPS_12}
LEFT = (
    "for CPU and CUDA 12.4 (8.0+PTX;9.0a); left out: sm_100a (PTX runs there), sm_120 (PTX runs "
    "there), unknown to nvcc 12.4"
)

DECISIONS: list[tuple[dict[str, Any], str]] = [
    ({}, f"for CPU and CUDA 13.0 ({ALL})"),
    # nvcc beside torch for another CUDA, or none
    ({"torch_cuda": ""}, f"for CPU and CUDA 13.0 ({ALL})"),
    ({"nvcc": "13.2"}, f"for CPU and CUDA 13.2 ({ALL})"),
    ({"nvcc": "12.8", "known": ()}, f"for CPU and CUDA 12.8 ({ALL})"),
    (
        {"torch_cuda": "12.8"},
        "for CPU; CUDA left out: nvcc 13.0 needs a driver for CUDA 13, torch is for 12.8 and no "
        "driver here: set CUDA_HOME to a toolkit of CUDA 12",
    ),
    (
        {"torch_cuda": "12.8", "driver": 12},
        "for CPU; CUDA left out: nvcc 13.0 needs a driver for CUDA 13, torch is for 12.8 and the "
        "driver here runs CUDA 12: set CUDA_HOME to a toolkit of CUDA 12",
    ),
    ({"torch_cuda": "12.8", "driver": 13}, f"for CPU and CUDA 13.0 ({ALL})"),
    (
        {"torch_cuda": "", "rocm": True},
        "for CPU; CUDA left out: torch is built for ROCm: install a build of torch for CUDA",
    ),
    # nvcc that does not know every chip, with and without a list of its own
    (OLD, LEFT),
    ({"nvcc": "12.4", "known": ()}, LEFT),
    (
        {"torch_cuda": "", "nvcc": "14.0", "known": (90, 100, 120)},
        "for CPU and CUDA 14.0 (9.0a;10.0a;12.0+PTX); left out: sm_80 (such GPUs cannot use the "
        "CUDA part), unknown to nvcc 14.0",
    ),
    (
        {"torch_cuda": "", "nvcc": "15.0", "known": (150,)},
        "for CPU; CUDA left out: nvcc 15.0 knows none of sm_80, sm_90a, sm_100a, sm_120: "
        "set CUDA_HOME to another toolkit",
    ),
    (
        {"nvcc": "11.8", "known": CHIPS_12},
        "for CPU; CUDA left out: nvcc 11.8 is older than 12.0: set CUDA_HOME to a newer toolkit",
    ),
    ({"chips": "8.0 9.0a+PTX"}, "for CPU and CUDA 13.0 (8.0;9.0a+PTX)"),
    ({"chips": "12.1f", "nvcc": "13.0"}, "for CPU and CUDA 13.0 (12.1f)"),
    # no nvcc, no torch, no compiler; modes
    (
        {"nvcc": "", "nvcc_fault": "nvcc was not found: set CUDA_HOME to a toolkit"},
        "for CPU; CUDA left out: nvcc was not found: set CUDA_HOME to a toolkit",
    ),
    ({"mode": "0"}, "for CPU; CUDA left out: FOLDCP_BUILD_CUDA=0"),
    ({"torch": "", "torch_fault": "no torch"}, "none: no torch"),
    (
        {"torch": "2.10.1"},
        f"none: torch 2.10.1 is older than 2.11: upgrade torch, then {toolchain.AGAIN}",
    ),
    ({"torch": "2.11.0a0+git12"}, f"for CPU and CUDA 13.0 ({ALL})"),
    ({"compiler_fault": "no C++ compiler"}, "none: no C++ compiler"),
]


@pytest.mark.parametrize(("change", "line"), DECISIONS)
def test_decisions(change: dict[str, Any], line: str) -> None:
    facts = replace(GOOD, **change)
    plan = decide(facts)
    assert plan.line() == line and plan.info("2.11")["line"] == line
    if facts.mode:
        return
    if plan.parts == "cuda":
        assert decide(replace(facts, mode="1")) == plan
    else:
        with pytest.raises(Refused) as refused:
            decide(replace(facts, mode="1"))
        assert str(refused.value) == f"FOLDCP_BUILD_CUDA=1, but {plan.why}"


def test_a_chip_that_was_asked_for_is_never_left_out() -> None:
    asked = replace(GOOD, **OLD, chips="8.0;10.0a+PTX;12.0")
    with pytest.raises(Refused, match="nvcc 12.4 does not know sm_100a, sm_120: .*knows 5.0 "):
        decide(asked)
    with pytest.raises(Refused, match="does not know sm_72"):
        decide(replace(GOOD, known=(), chips="7.2"))
    with pytest.raises(Refused, match="does not know sm_80a"):
        decide(replace(GOOD, chips="8.0a"))
    with pytest.raises(Refused, match="TORCH_CUDA_ARCH_LIST has 'Hopper'; write it like 8.0"):
        decide(replace(GOOD, chips="Hopper"))
    with pytest.raises(Refused, match="must be 0, 1 or unset, got 'yes'"):
        decide(replace(GOOD, mode="yes"))
    assert decide(replace(asked, mode="0")).parts == "cpu"  # nvcc is not asked then
    assert gencode("9.0a+PTX;12.0") == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
        "-gencode=arch=compute_120,code=sm_120",
    ]


def test_ptx_is_added_for_newer_chips() -> None:
    """Without PTX in what is kept, newer GPUs would have no code at all."""
    assert decide(replace(GOOD, nvcc="12.4", known=(90,))).chips == "9.0a+PTX"


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("[1/9] nvcc x\nnvcc error   : 'cicc' died due to signal 11\n", "'cicc' died"),
        ("g++ -Werror=format a.cpp\n\x1b[01ma.cpp:3:1: \x1b[Kfatal error:\x1b[m no x.h", "no x.h"),
        ("nvcc fatal   : Unsupported gpu architecture 'compute_120'", "Unsupported gpu"),
        ("c++: fatal error: Killed signal terminated program cc1plus", "Killed signal"),
        ("/bin/sh: 1: nvcc: not found\nninja: build stopped", "nvcc: not found"),
        ("ld: cannot find -lcudart_static\ncollect2: error: ld returned 1", "cannot find -lcud"),
        ("nothing to see", "raised\nby  torch"),
    ],
)
def test_a_build_that_fails_is_said_in_its_own_line(log: str, said: str) -> None:
    found = first_error(log, "raised\nby  torch")
    assert " ".join(said.split()) in found and "\n" not in found and "\x1b" not in found
    cpu = fall_back(Plan("cuda", "13.0", ALL), found)
    assert cpu.line() == f"for CPU; CUDA left out: it did not compile: {found}"
    assert fall_back(cpu, "x").line() == "none: the C++ part did not compile: x"


def stub(folder: Path, name: str, text: str) -> Path:
    """An executable shell script."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def stub_toolkit(home: Path, release: str, chips: tuple[int, ...], whole: bool = True) -> Path:
    """A toolkit whose nvcc answers questions and dies when it compiles."""
    listed = " ".join(f"sm_{chip}" for chip in chips)
    answers = f"""case "$*" in
        *--version*) echo "Cuda compilation tools, release {release}, V{release}.1";;
        *--list-gpu-code*) printf '%s\\n' {listed or "nvcc fatal"};;
        *--dryrun*) echo '#$ TOP={home}' >&2;;
        *) echo "nvcc error   : 'cicc' died due to signal 11" >&2; exit 1;;
        esac"""
    stub(home / "bin", "nvcc", answers)
    for name in ("include/cuda_runtime.h", "lib64/libcudart_static.a") if whole else ():
        (home / name).parent.mkdir()
        (home / name).touch()
    return home


class Setup:
    """Runs setup.py in this process up to the call of setuptools, in a folder of its own."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, patch
        self.asked: dict[str, Any] = {}
        for name in ("foldcp", "foldcp_kernels"):
            (folder / name).mkdir()
        for name in ("setup.py", "toolchain.py", "foldcp/_version.py"):
            (folder / name).write_text((ROOT / name).read_text())
        patch.setattr(setuptools, "setup", lambda **asked: self.asked.update(asked))
        patch.setattr(cpp_extension, "CUDA_HOME", None)
        patch.setattr(cpp_extension, "_check_cuda_version", cpp_extension._check_cuda_version)
        patch.setattr(sys, "path", list(sys.path))
        for name in ("FOLDCP_BUILD_CUDA", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "CXX", "CPPFLAGS"):
            patch.delenv(name, raising=False)
        patch.setenv("CUDA_HOME", str(stub_toolkit(folder / "cuda", "13.0", CHIPS_13)))

    def run(self) -> str:
        """Returns the line that `foldcp doctor` shows."""
        self.asked.clear()
        made = runpy.run_path(str(self.folder / "setup.py"))
        assert not (self.folder / made["INFO"]).exists(), "nothing is built yet"
        return made["built"][0]["line"]

    def sources(self) -> list[str]:
        return [Path(s).name for e in self.asked["ext_modules"] for s in e.sources]


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    return Setup(tmp_path, monkeypatch)


def test_toolkits_on_this_machine(build: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    build.patch.setattr(torch.version, "cuda", None)
    assert build.run() == f"for CPU and CUDA 13.0 ({ALL})"
    assert f"foldcp: compiled part: for CPU and CUDA 13.0 ({ALL})\n" in capsys.readouterr().err
    assert "pack.cu" in build.sources()
    (extension,) = build.asked["ext_modules"]
    assert str(build.folder / "cuda/include") in extension.include_dirs
    assert "-gencode=arch=compute_90a,code=sm_90a" in extension.extra_compile_args["nvcc"]
    # An older CUDA than torch's is allowed, which torch's own check would refuse.
    build.patch.setattr(torch.version, "cuda", "13.0")
    for release, chips in (("12.4", CHIPS_12), ("12.4", ())):
        home = stub_toolkit(build.folder / f"old{len(chips)}", release, chips)
        build.patch.setenv("CUDA_HOME", str(home))
        assert build.run().startswith("for CPU and CUDA 12.4 (8.0+PTX;9.0a); left out: sm_100a ")
        assert cpp_extension._check_cuda_version("g++", None) is None
    # What is not usable: half a toolkit, an nvcc that fails, a newer CUDA than torch's.
    half = stub_toolkit(build.folder / "half", "13.0", CHIPS_13, whole=False)
    build.patch.setenv("CUDA_HOME", str(half))
    assert build.run().startswith(f"for CPU; CUDA left out: {half} has nvcc but no ")
    dead = build.folder / "dead"
    stub(dead / "bin", "nvcc", "exit 1")
    build.patch.setenv("CUDA_HOME", str(dead))
    assert f"{dead}/bin/nvcc does not run: repair it" in build.run()
    build.patch.setenv("CUDA_HOME", str(build.folder / "cuda"))
    build.patch.setattr(torch.version, "cuda", "12.6")
    assert "nvcc 13.0 needs a driver for CUDA 13, torch is for 12.6 and " in build.run()
    assert not {"pack.cu", "cuda_backend.cpp"} & set(build.sources())
    build.patch.setenv("FOLDCP_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match="^foldcp: FOLDCP_BUILD_CUDA=1, but nvcc 13.0 needs a "):
        build.run()


def test_without_nvcc(build: Setup) -> None:
    build.patch.delenv("CUDA_HOME")
    there = shutil.which
    build.patch.setattr(shutil, "which", lambda name: None if "nvcc" in name else there(name))
    assert build.run() == "for CPU; CUDA left out: nvcc was not found: set CUDA_HOME to a toolkit"
    assert not {"pack.cu", "cuda_backend.cpp"} & set(build.sources())


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (None, "CXX={} was not found: install g++ 10 or newer, or set CXX"),
        (
            "echo '<stdin>:1:10: fatal error: concepts: No such file' >&2; exit 1",
            "{} compiles no C++20 (<stdin>:1:10: fatal error: concepts: No such file): install g++ "
            "10 or newer, or set CXX",
        ),
        (
            "echo '<stdin>:2:10: fatal error: Python.h: No such file' >&2; exit 1",
            f"Python.h is not in {sysconfig.get_path('include')}: install python3-dev",
        ),
    ],
)
def test_compilers_that_cannot(build: Setup, script: str | None, said: str) -> None:
    path = build.folder / "bin" / "c++"
    if script:
        stub(path.parent, path.name, script)
    build.patch.setenv("CXX", str(path))
    assert build.run() == f"none: {said.format(path)}"
    assert build.asked["ext_modules"] == [] and build.asked["options"] == {}
    build.patch.setenv("FOLDCP_BUILD_CUDA", "1")
    with pytest.raises(SystemExit) as ended:
        build.run()
    assert str(ended.value) == f"foldcp: FOLDCP_BUILD_CUDA=1, but {said.format(path)}"


WALLS = """
import sys
sys.path[:] = [p for p in sys.path if not p.endswith("site-packages")]
"""


@pytest.mark.parametrize("there", [True, False])
def test_an_isolated_build_finds_the_torch_of_its_environment(build: Setup, there: bool) -> None:
    """pip takes site-packages off the path of an isolated build, and what they add to it."""
    walls, env = build.folder / "walls", build.folder / "env"
    walls.mkdir()
    (walls / "sitecustomize.py").write_text(WALLS)
    (walls / "setuptools").symlink_to(Path(setuptools.__file__).parent)
    (walls / "_distutils_hack").symlink_to(Path(setuptools.__file__).parents[1] / "_distutils_hack")
    venv.create(env, symlinks=True)
    if there:  # in a folder that the environment shares with others
        (packages,) = env.glob("lib/python*/site-packages")
        (packages / "shared.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    done = subprocess.run(
        [env / "bin/python", "setup.py", "--version"], cwd=build.folder, capture_output=True,
        text=True, env={**os.environ, "PYTHONPATH": str(walls), "FOLDCP_BUILD_CUDA": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    none = f"none: there was no torch when it was built: {toolchain.AGAIN}"
    line = "for CPU; CUDA left out: FOLDCP_BUILD_CUDA=0" if there else none
    assert f"foldcp: compiled part: {line}\n" in done.stderr
