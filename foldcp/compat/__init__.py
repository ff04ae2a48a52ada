"""The published Fold-CP interface on DTensors: thin facades over the mesh, the layout and a ring.

    DistributedManager.initialize(device_type="cuda")
    DistributedManager.create_grid_group({"dp": 1, "cp": (2, 2)})
    manager = DistributedManager()
    ring_comm = Ring2DComm(
        manager.group["cp"], manager.subgroups["cp"][0], manager.layout_subgroups["cp"]
    )
    layer = DistributedTriangleMultiplication(
        Outgoing, layer_serial, manager.device_mesh_subgroups, ring_comm
    )
    out = layer(x, mask)  # DTensors [B, N, N, C] and [B, N, N], Shard(0), Shard(1), Shard(2)

As in that interface, and unlike `foldcp.modules`, the layer returns the update without the
residual. DTensor cuts N as `torch.chunk` does while our tiles are padded to equal sizes; where the
two differ, an exchange of regions converts between them.

Source: Fold-CP (arXiv 2603.14806) and NVIDIA's post "Scaling Biomolecular Modeling Using Context
Parallelism in NVIDIA BioNeMo".
"""

from __future__ import annotations

from foldcp.compat.manager import DistributedManager, GridLayout, Ring2DComm
from foldcp.compat.triangle import (
    Direction,
    DistributedTriangleMultiplication,
    DistributedTriangleMultiplicationIncoming,
    DistributedTriangleMultiplicationOutgoing,
    Incoming,
    Outgoing,
)

__all__ = [
    "Direction",
    "DistributedManager",
    "DistributedTriangleMultiplication",
    "DistributedTriangleMultiplicationIncoming",
    "DistributedTriangleMultiplicationOutgoing",
    "GridLayout",
    "Incoming",
    "Outgoing",
    "Ring2DComm",
]
