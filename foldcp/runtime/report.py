"""Word rank 0's lines about a run: the start line, advice, costs, and where memory ran out."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from foldcp import __version__
from foldcp.errors import is_command
from foldcp.fabric.memory import host_memory
from foldcp.runtime.screen.stages import Stages, peak_host_bytes

if TYPE_CHECKING:
    from foldcp.fabric.mesh import Mesh


_COLUMNS = 100  # of a line
_LARGE = 512  # tokens from which on ranks on CPUs may pay

# torch: "Tried to allocate 2.00 GiB" on a GPU, "you tried to allocate 123 bytes" on a CPU.
_ASKED = re.compile(r"tried to allocate ([\d.]+) ?([kmgt]i?b|bytes)?", re.IGNORECASE)
_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def out_of_memory(error: BaseException, mesh: Mesh, stage: str, tokens: int) -> str:
    """Word the message about a rank that ran out of memory.

    Args:
        error: what it met.
        mesh: of this rank.
        stage: what it was doing.
        tokens: N, 0: not known.

    Returns:
        One sentence with size, mesh, rank, stage, need, what there was, and what to do.
    """
    import torch

    size = f"{tokens:,} tokens" if tokens else "the input"
    where = f" in {stage}" if stage else ""
    asked = _ASKED.search(str(error))
    need = "more memory than there is"
    if asked:
        need = f"{float(asked[1]) * _UNITS[(asked[2] or 'bytes').lower()] / 1e9:.3g} GB more"
    if mesh.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(mesh.device)
    else:
        free, total = host_memory()
    more = "FOLDCP_NPROC" if is_command() else "torchrun --nproc-per-node N"
    fewer = "fewer samples (--diffusion_samples, --max_parallel_samples 1)"
    if not is_command():
        fewer = "fewer samples (diffusion_samples, max_parallel_samples=1)"
    smaller = "a smaller mode (FOLDCP_MEMORY=lean, FOLDCP_CHUNK_MB, FOLDCP_PRECISION=bf16)"
    return (
        f"out of memory: {size} on mesh {mesh.rows}x{mesh.cols}, rank {mesh.rank}{where}: it "
        f"needed {need} and had {free / 1e9:.3g} of {total / 1e9:.3g} GB free; use more ranks "
        f"({more}), {fewer} or {smaller}"
    )


def start_line(
    mesh: Mesh,
    precision: str,
    launcher: str = "none",
    groups: int = 1,
    sizes: Sequence[int] = (),
    lean: bool = False,
) -> str:
    """Word what rank 0 prints when the model is ready: one or two lines of up to 100 columns.

    Args:
        mesh: the mesh of ranks.
        precision: "fp32" or "bf16".
        launcher: what started the ranks.
        groups: data-parallel groups, each with such a mesh.
        sizes: tokens of the inputs.
        lean: the largest of them runs in lean memory.
    """
    ranks = groups * mesh.size
    kind = "GPU" if mesh.device.type == "cuda" else "CPU"
    shape = f"{mesh.rows}x{mesh.cols} mesh"
    many = f"{ranks} {kind} rank{'s' * (ranks > 1)}"
    parts = [
        shape if groups == 1 else f"{groups} groups of {shape}",
        many if ranks == 1 else f"{many} ({launcher})",
        precision,
        *(["lean memory"] if lean else ()),
        *([f"{mesh.transport} transport"] if mesh.size > 1 else ()),
        *([_sizes(sizes)] if sizes else ()),
    ]
    fits = len(parts)
    while len(line := f"foldcp {__version__}: {', '.join(parts[:fits])}") > _COLUMNS and fits > 1:
        fits -= 1
    return line if fits == len(parts) else f"{line}\nfoldcp: {', '.join(parts[fits:])}"


def _sizes(sizes: Sequence[int]) -> str:
    if len(sizes) == 1:
        return f"{sizes[0]:,} tokens"
    low, high = min(sizes), max(sizes)
    span = f"{high:,}" if low == high else f"{low:,} to {high:,}"
    return f"{len(sizes):,} inputs of {span} tokens"


def details(mesh: Mesh, kernels: str, swapped: str) -> str:
    """Word the line after it, with FOLDCP_VERBOSE.

    Args:
        mesh: the mesh of ranks.
        kernels: implementation of the local operations.
        swapped: which parts of the model run on tiles and which are left to stock Boltz.
    """
    return f"foldcp: {_transport(mesh)}, kernels {kernels}, {' '.join(swapped.split())}"


def hint(mesh: Mesh, sizes: Sequence[int]) -> str:
    """Advise where fewer ranks would be faster, or return "".

    Args:
        mesh: the mesh of ranks.
        sizes: tokens of the inputs.
    """
    if mesh.size == 1 or mesh.device.type != "cpu" or max(sizes, default=_LARGE) >= _LARGE:
        return ""
    return (
        "foldcp: ranks on the CPUs of one machine save memory, not time: "
        f"for {max(sizes):,} tokens one process is faster"
    )


def _transport(mesh: Mesh) -> str:
    if mesh.size == 1:
        return f"transport {mesh.transport}"
    chosen = {"multiplication": mesh.policy.multiplication, "attention": mesh.policy.attention}
    asked = [f"{op} {name}" for op, name in chosen.items() if name != "auto"]
    return (
        f"transport {mesh.transport} ({', '.join((mesh.policy.route, mesh.policy.wire, *asked))})"
    )


def costs(
    mesh: Mesh,
    seconds: float,
    gather: Callable[[Any], list[Any]] | None = None,
    stages: Stages | None = None,
) -> dict[str, Any]:
    """Collect time and memory of a run from all ranks; every rank must call it.

    Args:
        mesh: the mesh of ranks.
        seconds: wall time of the run.
        gather: brings the values of all ranks together; None: those of the mesh.
        stages: of this rank; this ends them.

    Returns:
        `seconds`, `mesh`, and one value per rank of `peak_rss_bytes` (host memory),
        `peak_gpu_bytes` (0 on CPU), `sent_bytes` and `received_bytes` (by exchanges), `exchanged`
        (bytes received, by exchange) and `stages` (see `Stages.end`).
    """
    stages = stages or Stages()
    of_stages = stages.end()
    mine = {
        "peak_rss_bytes": peak_host_bytes(),
        "peak_gpu_bytes": stages.peak_gpu_bytes,
        "sent_bytes": sum(mesh.traffic.sent.values()),
        "received_bytes": sum(mesh.traffic.received.values()),
        "exchanged": dict(mesh.traffic.received),
        "stages": of_stages,
    }
    ranks = (gather or mesh.ranks.all_gather_object)(mine)
    return {
        "seconds": seconds,
        "mesh": f"{mesh.rows}x{mesh.cols}",
        **{name: [rank[name] for rank in ranks] for name in mine},
    }
