"""Do all ranks plan the same exchanges? Asked once per input, before the first of them."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch

from foldcp.cost import strategy
from foldcp.layout import AtomLayout, PairLayout
from foldcp.mesh import STRATEGIES, Mesh
from foldcp.plans import token_plan
from foldcp.transport import TransportError
from foldcp.triangle_plans import triangle_attention_plan, triangle_multiplication_plan
from foldcp_kernels.chunking import chunk_bytes
from foldcp_kernels.dispatch import described


def planned(layout: PairLayout, atoms: AtomLayout, mesh: Mesh, itemsize: int) -> dict[str, str]:
    """What the exchanges of one input follow from, and a hash of plans that were made of it.

    Args:
        layout: of the pairs. atoms: of the atoms. mesh: the mesh.
        itemsize: bytes of an element that the triangle ops compute in.

    Returns:
        Names and values, alike on all ranks of a sound run.
    """
    seen = replace(layout, rank=layout.size - 1)
    parts = [triangle_multiplication_plan(seen, 128, out, 1, mesh.route) for out in (True, False)]
    parts += [triangle_attention_plan(seen, True, (0, seen.tile_rows), mesh.route)]
    parts += [token_plan(seen, ("rows", "cols", "all"))]
    steps = repr([(p.owned, p.steps, p.adjoint) for p in parts])
    return {
        "number of tokens": str(layout.n),
        "padded tokens": str(layout.padded),
        "number of atoms": str(atoms.atoms),
        "mesh": f"{mesh.rows}x{mesh.cols}",
        "transport": f"{mesh.transport} ({mesh.route}, {mesh.wire})",
        **{f"strategy of {op}": strategy(op, layout, mesh, 4, itemsize) for op in STRATEGIES},
        "largest chunk": f"{chunk_bytes(mesh.device)} bytes",
        "kernels": described(mesh.device),
        "precision": f"{itemsize} bytes",
        "plan": hashlib.sha256(steps.encode()).hexdigest()[:16],
    }


def agree(layout: PairLayout, atoms: AtomLayout, mesh: Mesh) -> None:
    """Compare what the ranks plan for an input.

    Args:
        layout: of the pairs. atoms: of the atoms. mesh: the mesh.

    Raises:
        TransportError: on every rank: they differ; names the first rank that does and in what.
    """
    if mesh.size == 1:
        return
    auto = torch.is_autocast_enabled(mesh.device.type)
    everyone = mesh.all_gather_object(planned(layout, atoms, mesh, 2 if auto else 4))
    for rank, other in enumerate(everyone):
        for name, value in everyone[0].items():
            if other[name] != value:
                raise TransportError(
                    f"the ranks plan different exchanges: {name} is {other[name]} on rank {rank} "
                    f"and {value} on rank 0: give every rank the same input, FOLDCP_* variables, "
                    "GPU and Python environment"
                )
