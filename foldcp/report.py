"""What foldcp says to the user: errors without a traceback, the line at the start, the costs."""

from __future__ import annotations

import resource
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foldcp.mesh import Mesh


class UserError(RuntimeError):
    """Something the user can put right; its text says how, and is shown without a traceback."""


def start_line(mesh: Mesh, precision: str, swapped: str, kernels: str = "torch") -> str:
    """The line that rank 0 prints when the model is ready.

    Args:
        mesh: the mesh of ranks.
        precision: "fp32" or "bf16".
        swapped: which parts of the model run on tiles and which are left to stock Boltz.
        kernels: implementation of the local operations.

    Returns:
        One line without a line break.
    """
    ranks = f"{mesh.size} rank{'s' if mesh.size > 1 else ''} on {mesh.device.type}"
    parts = [
        f"mesh {mesh.rows}x{mesh.cols} ({ranks})",
        _transport(mesh),
        f"kernels {kernels}",
        f"precision {precision}",
        " ".join(swapped.split()),
    ]
    return "foldcp: " + ", ".join(parts)


def _transport(mesh: Mesh) -> str:
    if mesh.size == 1:
        return f"transport {mesh.transport}"
    chosen = {"multiplication": mesh.multiplication, "attention": mesh.attention}
    asked = [f"{op} {name}" for op, name in chosen.items() if name != "auto"]
    return f"transport {mesh.transport} ({', '.join((mesh.route, mesh.wire, *asked))})"


def costs(mesh: Mesh, seconds: float) -> dict[str, Any]:
    """What a run cost; every rank of the mesh must call it.

    Args:
        mesh: the mesh of ranks.
        seconds: wall time of the run.

    Returns:
        `seconds`, `mesh`, and one value per rank of `peak_rss_bytes` (host memory),
        `peak_gpu_bytes` (0 on CPU), `sent_bytes` and `received_bytes` (by exchanges).
    """
    import torch

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mine = {
        "peak_rss_bytes": peak if sys.platform == "darwin" else peak * 1024,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0,
        "sent_bytes": sum(mesh.sent.values()),
        "received_bytes": sum(mesh.received.values()),
    }
    ranks = mesh.all_gather_object(mine)
    return {
        "seconds": seconds,
        "mesh": f"{mesh.rows}x{mesh.cols}",
        **{name: [rank[name] for rank in ranks] for name in mine},
    }
