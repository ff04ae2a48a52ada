"""The copy-engine transport as it is, on a stand-in of CUDA (native/stub_cuda.cpp)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from native import CSRC, SOURCES

TIME = 20  # seconds; what waits for a rank that is gone, and is not let go, waits for ever
FLUSH = 1 << 30  # CU_STREAM_WAIT_VALUE_FLUSH


def _cuda() -> Path | None:
    """Where CUDA's headers are."""
    if "CUDA_HOME" in os.environ:
        return Path(os.environ["CUDA_HOME"])
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    command = [nvcc, "-v", "--dryrun", "-x", "cu", "/dev/null"]
    found = re.search(r"TOP=(.*)", subprocess.run(command, capture_output=True, text=True).stderr)
    return Path(found[1]) if found else None


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The transport with its stand-in."""
    cuda = _cuda()
    if cuda is None or not (cuda / "include" / "cuda.h").exists() or shutil.which("g++") is None:
        pytest.skip("needs g++ and the headers of CUDA")
    folder = tmp_path_factory.mktemp("copy_engine")
    common = ["g++", "-std=c++20", "-O1", "-pthread", f"-I{CSRC}", f"-I{cuda / 'include'}"]
    # By this name the backend looks for torch's streams.
    stub = folder / "libtorch_cuda.so"
    shared = ["-shared", "-fPIC", f"-Wl,-soname,{stub.name}", "-o", stub]
    subprocess.run([*common, *shared, SOURCES / "stub_cuda.cpp"], check=True)
    names = ("cuda_backend", "cuda_carriers", "nccl/nccl", "nccl/nccl_abi", "nccl/nccl_aborts")
    sources = [SOURCES / "copy_engine.cpp", CSRC / "wire" / "view.cpp"]
    sources += [CSRC / "transports" / f"{name}.cpp" for name in names]
    out = folder / "copy_engine"
    links = [f"-L{folder}", "-ltorch_cuda", "-ldl", f"-Wl,-rpath,{folder}"]
    subprocess.run([*common, "-o", out, *sources, *links], check=True)
    return out


def _run(program: Path, what: str, **environ: str) -> str:
    done = subprocess.run(
        [program, what], capture_output=True, text=True, timeout=TIME, env={**os.environ, **environ}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("flushes", [True, False])
def test_messages_of_many_slots(program: Path, flushes: bool) -> None:
    """Numbers are right whatever GPU is current; waits flush remote writes where the GPU can."""
    said = _run(program, "exchange", **({"STUB_CUDA_FLUSHES": "1"} if flushes else {}))
    assert said == f"wrong 0 flags {FLUSH if flushes else 0}\n"


def test_a_peer_that_is_gone_holds_up_nothing(program: Path) -> None:
    assert _run(program, "gone") == "an exchange was not finished within 0 s\ngone\n"
    assert _run(program, "closed") == "another rank drops this input\ngone\n"
