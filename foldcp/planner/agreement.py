"""Do all ranks plan the same exchanges, and draw the same random numbers? Asked once per input."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace

import torch

from foldcp.errors import TransportError
from foldcp.fabric.mesh import Mesh
from foldcp.fabric.policy import STRATEGIES, Policy
from foldcp.layout.plans import token_plan
from foldcp.layout.tiles import AtomLayout, PairLayout
from foldcp.layout.triangle_plans import triangle_attention_plan, triangle_multiplication_plan
from foldcp.planner.choice import lean, strategy
from foldcp_kernels.core.chunking import chunk_bytes
from foldcp_kernels.core.dispatch import described

LOG = logging.getLogger("foldcp.planner.agreement")


def kind(device: torch.device) -> str:
    """Return what else than the seed determines the numbers that are drawn.

    A CUDA kernel draws with as many threads as the multiprocessors can run at once, so that draws
    of many numbers differ between GPUs; a CPU's follow from its vector instructions.
    """
    version = f"torch {torch.__version__}"
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"{device.type} ({torch.backends.cpu.get_cpu_capability()}), {version}"
    gpu = torch.cuda.get_device_properties(device)
    threads = gpu.max_threads_per_multi_processor
    return f"{gpu.name} ({gpu.multi_processor_count} x {threads} threads), {version}"


def planned(layout: PairLayout, atoms: AtomLayout, mesh: Mesh, itemsize: int) -> dict[str, str]:
    """Return what the exchanges of one input follow from, and a hash of plans made from it.

    Args:
        layout: of the pairs.
        atoms: of the atoms.
        mesh: the mesh.
        itemsize: bytes of an element that the triangle ops compute in.

    Returns:
        Names and values, alike on all ranks of a sound run.
    """
    seen = replace(layout, rank=layout.size - 1)
    parts = [
        triangle_multiplication_plan(seen, 128, out, 1, mesh.policy.route) for out in (True, False)
    ]
    parts += [triangle_attention_plan(seen, True, (0, seen.tile_rows), mesh.policy.route)]
    parts += [token_plan(seen, ("rows", "cols", "all"))]
    steps = repr([(p.owned, p.steps, p.adjoint) for p in parts])
    return {
        "number of tokens": str(layout.n),
        "padded tokens": str(layout.padded),
        "number of atoms": str(atoms.atoms),
        "mesh": f"{mesh.rows}x{mesh.cols}",
        "transport": f"{mesh.transport} ({mesh.policy.route}, {mesh.policy.wire})",
        **{f"strategy of {op}": strategy(op, layout, mesh, 4, itemsize) for op in STRATEGIES},
        "memory": "lean" if lean(layout, mesh) else "fast",
        "largest chunk": f"{chunk_bytes(mesh.device)} bytes",
        "kernels": described(mesh.device),
        "precision": f"{itemsize} bytes, {_formats(mesh.policy)}",
        "plan": hashlib.sha256(steps.encode()).hexdigest()[:16],
    }


def _formats(policy: Policy) -> str:
    groups = ("contraction", "single", "tokens", "atoms")
    return ", ".join(f"{group} {getattr(policy, group)}" for group in groups)


def agree(layout: PairLayout, atoms: AtomLayout, mesh: Mesh) -> None:
    """Compare what the ranks plan for an input, and set whether they draw alike (`mesh.alike`).

    Args:
        layout: of the pairs.
        atoms: of the atoms.
        mesh: the mesh.

    Raises:
        TransportError: on every rank: they differ; names the first rank that does and in what.
    """
    if mesh.size == 1:
        return
    auto = torch.is_autocast_enabled(mesh.device.type)
    mine = planned(layout, atoms, mesh, 2 if auto else 4), kind(mesh.device)
    everyone = mesh.ranks.all_gather_object(mine)
    first, drawn_by = everyone[0]
    for rank, (other, _) in enumerate(everyone):
        for name, value in first.items():
            if other[name] != value:
                raise TransportError(
                    f"the ranks plan different exchanges: {name} is {other[name]} on rank {rank} "
                    f"and {value} on rank 0: give every rank the same input, FOLDCP_* variables, "
                    "GPU and Python environment"
                )
    odd = [rank for rank, (_, other) in enumerate(everyone) if other != drawn_by]
    mesh.alike = not odd
    if odd and mesh.is_root:
        why = f"rank {odd[0]} is on {everyone[odd[0]][1]}, rank 0 on {drawn_by}"
        if mesh.is_new(why):
            LOG.warning(
                "a seed gives other numbers on each, all ranks take those of rank 0: %s", why
            )
