"""Measure how much memory a rank may still take."""

from __future__ import annotations

from pathlib import Path

import torch

from foldcp.fabric.mesh import Mesh


def free_bytes(mesh: Mesh) -> int | None:
    """Return the memory that this rank may still take, in bytes; None where it is not known."""
    if mesh.device.type == "cuda":
        if not torch.cuda.is_available():
            return None  # shapes of a device that is not there (bench/synthetic/device.py)
        free, _ = torch.cuda.mem_get_info(mesh.device)
        held = torch.cuda.memory_reserved(mesh.device) - torch.cuda.memory_allocated(mesh.device)
        return free + held
    available, _ = host_memory()
    # The ranks of a machine share it; how many are on this one is not known here.
    return available // mesh.size or None


def host_memory() -> tuple[int, int]:
    """Return (available, total) memory of this machine in bytes; zeros where it is not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return sizes.get("MemAvailable", 0), sizes.get("MemTotal", 0)
