"""The published Fold-CP example, unchanged but for its imports, on foldcp's rings.

    torchrun --nproc-per-node 4 examples/fold_cp_snippet.py

Look at: between the two marks stands what Fold-CP users have already; a layer of Boltz goes in,
DTensors come out, and the last line compares them with the same layer on one rank. 13 tokens do not
divide by 2, and need not.
"""

import os

import torch
from boltz.model.layers.triangular_mult import TriangleMultiplicationOutgoing
from torch.distributed.tensor import Shard, distribute_tensor

from foldcp.compat import (
    DistributedManager,
    DistributedTriangleMultiplication,
    Outgoing,
    Ring2DComm,
)

r, N, C = 2, 13, 128
device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
torch.manual_seed(0)  # all ranks make the same layer and tensors
layer_serial = TriangleMultiplicationOutgoing(C)
for p in layer_serial.parameters():  # Boltz starts with an output of zero
    torch.nn.init.normal_(p, std=C**-0.5)
layer_serial.to(device)
x_global = torch.randn(1, N, N, C).to(device)
mask_global = (torch.rand(1, N, N) > 0.2).float().to(device)

# --- published ---
DistributedManager.initialize(device_type=device)
DistributedManager.create_grid_group({"dp": 1, "cp": (r, r)})
manager = DistributedManager()
ring_comm = Ring2DComm(
    manager.group["cp"], manager.subgroups["cp"][0], manager.layout_subgroups["cp"]
)
layer = DistributedTriangleMultiplication(
    Outgoing, layer_serial, manager.device_mesh_subgroups, ring_comm
)
placements = (Shard(0), Shard(1), Shard(2))
x = distribute_tensor(x_global, manager.device_mesh_subgroups, placements)
mask = distribute_tensor(mask_global, manager.device_mesh_subgroups, placements)
out = layer(x, mask)
# --- published ---

alone = layer_serial(x_global, mask_global)
error = ((out.full_tensor() - alone).abs().max() / alone.abs().max()).item()
held = list(x.to_local().shape)
print(f"rank {manager.rank} of {manager.world_size} holds {held}: error {error:.0e}")
DistributedManager.cleanup()
