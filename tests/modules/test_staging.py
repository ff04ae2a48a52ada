"""Nothing is packed between ranks in a pairformer block on CUDA (see transport/program.py).

A block in Boltz-2's dimensions runs on fake CUDA tensors with the fused kernels, on every rank of a
mesh without the others. Counted is every byte that the executor would pack before it sends or after
it receives. Not counted: what the ops' own kernels write, and the part of a region that a rank
copies from its own tile.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch
from boltz.model.layers.pairformer import PairformerLayer as Stock

from foldcp.boltz.families.dry_run.device import fake_cuda
from foldcp.boltz.families.dry_run.mesh import fake_mesh
from foldcp.config import ROUTES
from foldcp.fabric.mesh import Mesh
from foldcp.fabric.policy import STRATEGIES
from foldcp.modules.trunk.pairformer import PairformerLayer
from foldcp.rings import triangle_attention
from foldcp_kernels.core.dispatch import default_impl, set_impl
from foldcp_kernels.triangle_attention import TriangleAttentionWeights
from foldcp_kernels.triangle_attention.choice import chosen
from foldcp_kernels.triangle_attention.parts import bias_panels, project_bias, project_lines
from foldcp_kernels.triangle_multiplication import TriangleMultiplicationWeights
from foldcp_kernels.triangle_multiplication import parts as multiplication
from foldcp_kernels.triangle_multiplication.parts import plane_panels, project_planes

N, SINGLE, PAIR, HEADS = 3605, 384, 128, 16
OPS = {*STRATEGIES, "attention_pair_bias"}
AUTO: dict[str, str] = {}
PANELS, RING = (dict.fromkeys(("multiplication", "attention"), f"panel-{x}") for x in ROUTES)
SPREAD = {"multiplication": "channel", "attention": "rows"}


@pytest.fixture(autouse=True)
def fused() -> Iterator[None]:
    before = default_impl()
    set_impl("triton")
    yield
    set_impl(before)


def staged(mesh: Mesh) -> Counter[str]:
    """Bytes that one block packs on a rank, by op; each op exchanges something."""
    with torch.device("meta"):
        twin = Stock(SINGLE, PAIR, num_heads=HEADS, v2=True).eval().requires_grad_(False)
    with fake_cuda():
        twin.to_empty(device="cuda")
        layout = mesh.layout(N)
        z = torch.empty(1, layout.tile_rows, layout.tile_cols, PAIR, device="cuda")
        s = torch.empty(1, layout.shard, SINGLE, device="cuda")
        PairformerLayer(twin, mesh)(s, z, layout)
    assert {op for op, count in mesh.traffic.received.items() if count} == OPS
    return +mesh.traffic.staged


@pytest.mark.parametrize("cols", [2, 4])
def test_a_block_packs_nothing(cols: int) -> None:
    # A rank of each row of the mesh by the strategies that it chooses, one by each of the others.
    for rank, names in ((1, AUTO), (2 * cols - 1, AUTO), (1, PANELS), (cols, SPREAD), (1, RING)):
        mesh = fake_mesh(2, cols, rank, "cuda", **names)
        assert not staged(mesh), f"rank {rank} of 2x{cols}, {names or 'auto'}"


def test_what_is_not_aligned_or_not_contiguous_is_packed() -> None:
    assert staged(replace(fake_mesh(2, 2, 1, "cuda"), multiple=1))

    def strided(*args: object) -> tuple[torch.Tensor, ...]:
        return tuple(x.mT.contiguous().mT for x in made(*args))

    made = triangle_attention.bias_panels
    mesh = fake_mesh(2, 2, 1, "cuda", attention="panel-direct")
    with mock.patch.object(triangle_attention, "bias_panels", strided):
        assert staged(mesh).keys() == {"triangle_attention"}


@pytest.mark.parametrize("head_dim", [16, 8])  # q in one launch with k and v, and apart
def test_panels_hold_what_the_whole_holds(head_dim: int) -> None:
    c, heads, d = 32, 4, 6
    hd = heads * head_dim
    g = torch.Generator().manual_seed(1)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g)

    shapes = (c,), (c,), (heads, c), (hd, c), (hd, c), (hd, c), (hd, c), (c, hd)
    w = TriangleAttentionWeights(*(rand(*s) for s in shapes), heads)
    shapes = (c,), (c,), (2 * d, c), (2 * d, c), (d,), (d,), (c, d), (c, c)
    w2 = TriangleMultiplicationWeights(*(rand(*s) for s in shapes))
    z, mask = rand(2, 2, 4, c), (rand(2, 2, 4) > 0).float()
    for x, keep in ((z, mask), (z.transpose(1, 2), mask.transpose(1, 2))):
        how, how2 = chosen(x, w), multiplication.chosen(x, w2)
        whole = project_lines(x, w, how)  # with gradients on, a product of its own: one tensor
        planes = project_planes(x, keep, w2, how2, (1, 5))
        bias = project_bias(x, w, how)
        with torch.no_grad():
            for panels in (1, 2):
                parts = project_lines(x, w, how, panels)
                assert len(parts.kv) == panels
                # Not to the bit: a product of fewer columns may add up in another order.
                for got, want in (
                    (parts.q, whole.q),
                    (torch.cat(parts.kv, 2), whole.kv[0]),
                    (torch.cat(bias_panels(x, w, how, panels), 3), bias),
                    (torch.cat(plane_panels(x, keep, w2, how2, (1, 5), panels), 3), planes),
                ):
                    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
