"""Measure how much memory a rank may still take."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from foldcp.fabric.mesh import Mesh


def free_bytes(mesh: Mesh) -> int | None:
    """Return the memory that this rank may still take, in bytes; None where it is not known."""
    if mesh.device.type == "cuda":
        if not torch.cuda.is_available():
            return None  # shapes of a device that is not there (foldcp.boltz.families.dry_run)
        free, _ = torch.cuda.mem_get_info(mesh.device)
        held = torch.cuda.memory_reserved(mesh.device) - torch.cuda.memory_allocated(mesh.device)
        return free + held
    available, _ = host_memory()
    # The ranks of a machine share it; how many are on this one is not known here.
    return available // mesh.size or None


def device_bytes(mesh: Mesh) -> int | None:
    """Return the memory of a rank's GPU in bytes, whole GiB; None on CPUs."""
    if mesh.device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(mesh.device).total_memory >> 30 << 30


def on_host(x: Tensor) -> Tensor:
    """Copy a tensor to host memory, pinned where it is on a GPU; `rows_on` brings it back.

    Both are work of the current stream: no copy overtakes another one, and the host waits for none.
    """
    pinned = x.device.type == "cuda" and torch.cuda.is_available()
    host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=pinned)
    return host.copy_(x, non_blocking=pinned)


def rows_on(device: torch.device, z: Tensor, lo: int, hi: int) -> Tensor:
    """Return rows of a tile on a device: a view where the tile is there.

    Args:
        device: of the mesh.
        z: pair tile [B, T_r, T_c, C], there or from `on_host`.
        lo: first row.
        hi: row after the last.
    """
    rows = z[:, lo:hi]
    if z.device.type == device.type:
        return rows
    there = torch.empty(rows.shape, dtype=z.dtype, device=device)
    return there.copy_(rows, non_blocking=True)


def host_memory() -> tuple[int, int]:
    """Return (available, total) memory of this machine in bytes; zeros where it is not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return sizes.get("MemAvailable", 0), sizes.get("MemTotal", 0)
