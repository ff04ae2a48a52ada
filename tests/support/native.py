"""What tests of the compiled extension share: operators, compilers, a twin of the FP8 wire."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
SOURCES = ROOT / "tests" / "native"
SEGMENT = 128  # elements that share a scale
FP8 = torch.float8_e4m3fn


def operators() -> Any:
    """`torch.ops.foldcp`; fails where the extension is missing."""
    from foldcp_kernels.core.extension import load

    extension = load()
    assert extension.ops is not None, extension.why
    return extension.ops


def compile_shared(source: Path, out: Path) -> Path:
    """Compile one C++ file into a shared library."""
    command = ["g++", "-std=c++20", "-O1", "-Wall", "-Wextra", "-Wno-missing-field-initializers"]
    command += ["-Werror", "-shared", "-fPIC", "-o", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def scale_bytes(count: int) -> int:
    """Where the payload of an FP8 piece begins."""
    return -(-4 * -(-count // SEGMENT) // 16) * 16


def wire_bytes(view: Tensor, fp8: bool) -> int:
    """Bytes of a piece on the wire."""
    if fp8:
        return scale_bytes(view.numel()) + view.numel()
    return view.numel() * view.element_size()


def encode(x: Tensor) -> Tensor:
    """Torch twin of the FP8 wire: uint8 [scale_bytes + n], the bytes between the parts are zero."""
    n = x.numel()
    flat = torch.zeros(-(-n // SEGMENT) * SEGMENT)
    flat[:n] = x.reshape(-1).float()
    values = flat.view(-1, SEGMENT)
    most = values.abs().amax(1) if n else flat
    fraction, exponent = torch.frexp(most.double())
    # most = fraction 2^exponent <= 448 scale = 7/8 2^9 scale, float32's smallest normal at least
    exponent = (exponent - 9 + (fraction > 0.875).int()).clamp(min=-126)
    scales = torch.ldexp(torch.ones(len(most)), exponent)
    scales[most == 0] = 1.0
    scales[~most.isfinite()] = torch.nan
    payload = (values / scales[:, None]).clamp(-448, 448).to(FP8).view(torch.uint8)
    payload[scales.isnan()] = 0x7F
    out = torch.zeros(scale_bytes(n) + n, dtype=torch.uint8)
    out[: 4 * len(scales)] = scales.view(torch.uint8)
    out[scale_bytes(n) :] = payload.reshape(-1)[:n]
    return out


def decode(message: Tensor, like: Tensor) -> Tensor:
    """Torch twin of the FP8 wire's other end; finite numbers stay finite in `like`'s dtype."""
    n = like.numel()
    scales = message[: 4 * -(-n // SEGMENT)].view(torch.float32)
    payload = message[scale_bytes(n) :].view(FP8).double()
    values = payload * scales.double().repeat_interleave(SEGMENT)[:n]
    largest = torch.finfo(like.dtype if like.dtype != torch.float64 else torch.float32).max
    return values.clamp(-largest, largest).to(like.dtype).reshape(like.shape)


@dataclass
class Place:
    """A rank among the processes of `run_ranks`.

    Args:
        rank: of this process.
        size: number of processes.
        folder: that all see.
        barrier: of all.
    """

    rank: int
    size: int
    folder: Path
    barrier: Any

    def meet(self) -> None:
        """Wait for the others."""
        self.barrier.wait(60)

    def gather(self, name: str, text: str) -> list[str]:
        """Every rank's text; `name` must be new."""
        (self.folder / f"{name}.{self.rank}").write_text(text)
        self.meet()
        return [(self.folder / f"{name}.{rank}").read_text() for rank in range(self.size)]


def run_ranks(size: int, folder: Path, cases: dict[str, Callable[[Place], Any]]) -> dict[str, str]:
    """Run cases one after the other in `size` processes.

    Args:
        size: number of processes.
        folder: for what they share.
        cases: functions at the top level of a module, by name.

    Returns:
        For each case what failed: tracebacks with their ranks, or "".
    """
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(size), context.Queue()
    places = [Place(rank, size, folder, barrier) for rank in range(size)]
    processes = [context.Process(target=_serve, args=(p, cases, queue)) for p in places]
    for process in processes:
        process.start()
    try:
        told = [queue.get(timeout=300) for _ in places]
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    reports = {}
    for name in cases:
        texts = [(rank, failed.get(name, "not run")) for rank, failed in told]
        # Ranks that only missed another one at the barrier come last.
        texts.sort(key=lambda x: "BrokenBarrier" in x[1])
        reports[name] = "\n".join(f"rank {rank}: {text}" for rank, text in texts if text)
    return reports


def _serve(place: Place, cases: dict[str, Callable[[Place], Any]], queue: Any) -> None:
    torch.set_num_threads(1)
    failed = {}
    for name, case in cases.items():
        before = dict(os.environ)
        try:
            place.meet()
            case(place)
            failed[name] = ""
        except BaseException:  # pytest's failures are no Exceptions
            failed[name] = traceback.format_exc()
            place.barrier.abort()
        for variable in set(os.environ) - set(before):
            del os.environ[variable]
        os.environ.update(before)
        if failed[name]:
            break
    queue.put((place.rank, failed))
    queue.close()
    queue.join_thread()
    os._exit(0)  # threads of an exchange that hangs may still be at work
