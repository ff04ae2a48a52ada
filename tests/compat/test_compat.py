"""The published Fold-CP interface: its snippet as it stands, and DTensors against stock Boltz."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from boltz.model.layers.triangular_mult import (
    TriangleMultiplicationIncoming,
    TriangleMultiplicationOutgoing,
)
from compact import stock_in_double
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from foldcp.compat import (
    Direction,
    DistributedManager,
    DistributedTriangleMultiplication,
    DistributedTriangleMultiplicationIncoming,
    GridLayout,
    Incoming,
    Outgoing,
    Ring2DComm,
)

TOLERANCE = 1e-12  # relative, float64
CHANNELS = 6
SERIAL = {Outgoing: TriangleMultiplicationOutgoing, Incoming: TriangleMultiplicationIncoming}

# The calls of the Fold-CP post (see foldcp/compat/__init__.py) stand between two marks.
MARK = "# --- published ---"
EXAMPLE = Path(__file__).parents[2] / "examples" / "fold_cp_snippet.py"
BEFORE = """
import torch
from boltz.model.layers.triangular_mult import TriangleMultiplicationOutgoing
from compact import stock_in_double
from foldcp.compat import (
    DistributedManager, DistributedTriangleMultiplication, Outgoing, Ring2DComm
)
from torch.distributed.tensor import Shard, distribute_tensor

r, N, device = 2, 13, "cpu"
torch.manual_seed(0)
layer_serial = TriangleMultiplicationOutgoing(8).double()
for p in layer_serial.parameters():
    torch.nn.init.normal_(p)
x_global = torch.randn(1, N, N, 8, dtype=torch.float64)
mask_global = (torch.rand(1, N, N) > 0.2).double()
"""
AFTER = """
with stock_in_double():
    want = layer_serial(x_global, mask_global)
assert out.placements == x.placements and out.shape == x.shape
assert x.to_local().shape[1] == (7, 6)[manager.rank // 2]
error = ((out.full_tensor() - want).abs().max() / want.abs().max()).item()
assert error < 1e-12, error
if manager.rank == 0:
    print(f"published snippet on {manager.world_size} ranks: error {error:.1e}")

from test_compat import every_grid

every_grid()
"""


def test_published_snippet_and_every_grid_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "snippet.py"
    _, published, _ = EXAMPLE.read_text().split(MARK)
    script.write_text(BEFORE + published + AFTER)
    here = Path(__file__).parent
    path = [here, here.parent / "support", here.parents[1]]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "4", str(script)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "published snippet on 4 ranks" in done.stdout
    assert done.stdout.count("every grid agrees") == 4


def _layer(direction: Direction, g: torch.Generator) -> nn.Module:
    layer = SERIAL[direction](CHANNELS).double()
    with torch.no_grad():
        for p in layer.parameters():  # Boltz starts with an output of zero
            p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype) * 0.5 + (p.ndim == 1))
    return layer


def _serial(layer: nn.Module, x: Tensor, mask: Tensor, dout: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    with stock_in_double():
        out = layer(leaf, mask)
        return [out.detach(), *torch.autograd.grad(out, [leaf, *layer.parameters()], dout)]


def _error(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()


def _compare(
    grid: dict[str, int | tuple[int, ...]], placements: list[Placement], n: int, first: Direction
) -> None:
    """Output and all gradients of one layer against stock; then inference, inputs untouched."""
    g = torch.Generator().manual_seed(n)
    manager = DistributedManager()
    comm = Ring2DComm(
        manager.group["cp"], manager.subgroups["cp"][0], manager.layout_subgroups["cp"]
    )
    serial = _layer(first, g)
    layer = DistributedTriangleMultiplication(first, serial, manager.device_mesh_subgroups, comm)
    x, dout = (torch.randn(2, n, n, CHANNELS, generator=g, dtype=torch.float64) for _ in "xd")
    mask = (torch.rand(2, n, n, generator=g) > 0.2).double()
    want = _serial(serial, x, mask, dout)

    def scatter(t: Tensor) -> DTensor:
        return distribute_tensor(t, manager.device_mesh_subgroups, placements)

    leaf, dmask = scatter(x).requires_grad_(), scatter(mask.bool())
    out = layer(leaf, dmask)
    assert out.placements == tuple(placements) and out.shape == x.shape
    assert out.to_local().shape == leaf.to_local().shape
    out.backward(scatter(dout))
    got = [out.detach().full_tensor(), leaf.grad.full_tensor()]
    names = dict(serial.named_parameters())
    assert list(dict(layer.named_parameters())) == list(names)
    got += [p.grad.full_tensor() for p in layer.parameters()]
    with torch.no_grad():
        got.append(layer(leaf, dmask).full_tensor())
    assert torch.equal(leaf.detach().full_tensor(), x)
    for name, a, b in zip(["out", "x", *names, "inference"], got, [*want, want[0]], strict=True):
        assert _error(a, b) <= TOLERANCE, f"{grid} N={n} {first} {name}: {_error(a, b):.2e}"


def _on_grid(grid: dict[str, int | tuple[int, ...]], batch: Placement, sizes: list[int]) -> None:
    DistributedManager.initialize(grid, device_type="cpu")
    for i, n in enumerate(sizes):
        placements = [Shard(1), Shard(2)]
        if "dp" in grid:
            placements.insert(list(grid).index("dp") * 2, batch)
        _compare(grid, placements, n, (Outgoing, Incoming)[i % 2])


def every_grid() -> None:
    """On 4 ranks: N below the ranks of an axis (empty shards), odd, divisible by R and Q, by P."""
    _on_grid({"dp": 1, "cp": (2, 2)}, Shard(0), [1, 5, 6, 17, 16])
    _on_grid({"cp": (1, 4)}, Shard(0), [5, 9])
    _on_grid({"cp": (4, 1)}, Shard(0), [9])
    _on_grid({"dp": 2, "cp": (1, 2)}, Shard(0), [7])
    _on_grid({"dp": 2, "cp": (2, 1)}, Replicate(), [7])
    _on_grid({"cp": (2, 1), "dp": 2}, Shard(0), [7])
    with pytest.raises(ValueError, match="needs 6 ranks but 4 were started.*nproc-per-node 6"):
        DistributedManager.create_grid_group({"dp": 1, "cp": (2, 3)})
    DistributedManager.cleanup()
    print("every grid agrees")


@pytest.fixture
def single() -> Iterator[DistributedManager]:
    DistributedManager.initialize({"dp": 1, "cp": (1, 1)}, device_type="cpu")
    yield DistributedManager()
    DistributedManager.cleanup()
    assert not torch.distributed.is_initialized()


def test_single_process(single: DistributedManager) -> None:
    for direction in (Outgoing, Incoming):
        _compare({"dp": 1, "cp": (1, 1)}, [Shard(0), Shard(1), Shard(2)], 7, direction)


def test_grid_layout_is_row_major() -> None:
    layout = GridLayout((2, 3))
    assert layout.strides == (3, 1)
    assert [layout.ravel(layout.unravel(i)) for i in range(6)] == list(range(6))
    assert layout.unravel(4) == (1, 1)


def test_manager_errors() -> None:
    with pytest.raises(RuntimeError, match="call DistributedManager.initialize"):
        DistributedManager()
    with pytest.raises(RuntimeError, match="call DistributedManager.initialize"):
        DistributedManager.create_grid_group({"dp": 1, "cp": (2, 2)})
    with pytest.raises(ValueError, match="`device_type` and `backend` must be one of"):
        DistributedManager.initialize(device_type="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match='pass device_type="cpu"'):
            DistributedManager.initialize(device_type="cuda")
    assert not DistributedManager.is_initialized()


def test_layer_errors(single: DistributedManager) -> None:
    with pytest.raises(KeyError, match="no group .*pp.*create_grid_group"):
        _ = single.group["pp"]
    mesh = single.device_mesh_subgroups
    groups = single.group["cp"], single.subgroups["cp"][0]
    with pytest.raises(ValueError, match="does not fit groups of 1 and 1 ranks"):
        Ring2DComm(*groups, GridLayout((2, 2)))
    comm = Ring2DComm(*groups, single.layout_subgroups["cp"])
    serial = TriangleMultiplicationOutgoing(CHANNELS)
    with pytest.raises(ValueError, match="`layer` is a TriangleMultiplicationOutgoing but"):
        DistributedTriangleMultiplicationIncoming(serial, mesh, comm)
    with pytest.raises(ValueError, match="got Linear with"):
        DistributedTriangleMultiplication(Outgoing, nn.Linear(2, 2), mesh, comm)
    with pytest.raises(ValueError, match="`direction` must be Outgoing or Incoming"):
        DistributedTriangleMultiplication("outgoing", serial, mesh, comm)
    with pytest.raises(ValueError, match="has no two axes with the ranks"):
        DistributedTriangleMultiplication(Outgoing, serial, single.device_mesh["dp"], comm)
    layer = DistributedTriangleMultiplication(Outgoing, serial, mesh, comm)
    x, mask = torch.zeros(1, 4, 4, CHANNELS), torch.ones(1, 4, 4)

    def call(x: Tensor, x_at: list[Placement], mask: Tensor, mask_at: list[Placement]) -> None:
        layer(distribute_tensor(x, mesh, x_at), distribute_tensor(mask, mesh, mask_at))

    good = [Shard(0), Shard(1), Shard(2)]
    with pytest.raises(ValueError, match="`x` must be a DTensor.*got Tensor.*distribute_tensor"):
        layer(x, mask)
    with pytest.raises(ValueError, match="`x` is placed .*redistribute"):
        call(x, [Shard(0), Shard(2), Shard(1)], mask, good)
    with pytest.raises(ValueError, match="`mask` is placed .*redistribute"):
        call(x, good, mask, [Replicate(), Shard(1), Shard(2)])
    with pytest.raises(ValueError, match=r"`x` must be \[B, N, N, C\], got \[1, 4, 3, 6\]"):
        call(x[:, :, :3], good, mask, good)
    with pytest.raises(ValueError, match=r"`mask` must be \[B, N, N\], got \[1, 4, 4, 1\]"):
        call(x, good, mask[..., None], good)
