"""What tests of the compiled extension share: operators, compilers, a twin of the FP8 wire."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foldcp.fabric.mesh import Mesh

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
    """A rank of a mesh, for cases that use the extension's operators alone.

    Args:
        mesh: for meetings.
        folder: that all ranks see.
    """

    mesh: Mesh
    folder: Path

    @property
    def rank(self) -> int:
        """Number of this rank."""
        return self.mesh.rank

    def meet(self) -> None:
        """Wait for the others."""
        self.mesh.ranks.barrier()

    def gather(self, text: str) -> list[str]:
        """Collect every rank's text, in rank order."""
        return self.mesh.ranks.all_gather_object(text)
