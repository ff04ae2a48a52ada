"""FP8 on the wire: how far the triangle ops move, forward and backward, by every strategy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cutting import pad_tile, rand, valid, whole
from ranks import run
from torch import Tensor

from foldcp.fabric.mesh import Mesh
from foldcp.fabric.policy import STRATEGIES
from foldcp.layout.tiles import PairLayout
from foldcp.rings.triangle_attention import triangle_attention
from foldcp.rings.triangle_multiplication import triangle_multiplication
from foldcp_kernels.core import definitions as reference
from foldcp_kernels.triangle_attention import TriangleAttentionWeights
from foldcp_kernels.triangle_multiplication import TriangleMultiplicationWeights

# Relative, root mean square, of updates and of gradients. e4m3 rounds to 4 significant bits, which
# puts an element off by about 1/40 of itself. Gradients pass through it on the way there and back,
# in `rows` those of normed lines and of what attention made of them.
FORWARD, BACKWARD = 0.04, 0.06
LEAST = 1e-4  # below it, nothing can have travelled as FP8


def _off(got: Tensor, want: Tensor) -> float:
    return ((got - want).square().mean().sqrt() / want.square().mean().sqrt()).item()


def distances(mesh: Mesh, n: int) -> dict[str, tuple[float, float]]:
    """(error of the update, error of the gradient of z) of this rank's tile, by case."""
    layout = PairLayout(n, mesh.rows, mesh.cols, mesh.rank)
    g = torch.Generator().manual_seed(3)
    c, h = 32, 2
    z, dout = rand(g, 1, n, n, c), rand(g, 1, n, n, c)
    mask = torch.ones(1, n, n, dtype=torch.float64)
    keep = pad_tile(mask, layout, (1, 2), 0.0)
    shapes = {
        "triangle_multiplication": [(c,), (c,), (2 * c, c), (2 * c, c), (c,), (c,), (c, c), (c, c)],
        "triangle_attention": [(c,), (c,), (h, c), *[(c, c)] * 5],
    }
    out = {}
    for op, names in STRATEGIES.items():
        ws = [rand(g, *s) / c**0.5 + (len(s) == 1) for s in shapes[op]]
        for first in (True, False):

            def call(
                x: Tensor, at: Mesh | None, op: str = op, ws: Any = ws, f: bool = first
            ) -> Tensor:
                if op == "triangle_multiplication":
                    w = TriangleMultiplicationWeights(*ws)
                    if at is None:
                        return reference.triangle_multiplication(x, mask, w, f)
                    return triangle_multiplication(x, keep, w, f, layout, at)
                a = TriangleAttentionWeights(*ws, h)
                if at is None:
                    return reference.triangle_attention(x, mask, a, f)
                return triangle_attention(x, None, a, f, layout, at)

            leaf = z.clone().requires_grad_()
            want = call(leaf, None)
            (grad,) = torch.autograd.grad(want, leaf, dout)
            want, grad = (whole(x, layout, (1, 2)) for x in (want.detach() - z, grad - dout))
            for name in names[1:]:
                field = op.removeprefix("triangle_")
                chosen = mesh.with_policy(wire="fp8", **{field: name})
                tile = pad_tile(z, layout, (1, 2), 0.0)
                with torch.no_grad():
                    got = call(tile.clone(), chosen) - tile
                mine = tile.clone().requires_grad_()
                back = torch.autograd.grad(
                    call(mine, chosen), mine, pad_tile(dout, layout, (1, 2), 0.0)
                )[0] - pad_tile(dout, layout, (1, 2), 0.0)
                out[f"{op} {name} {first}"] = (
                    _off(valid(got, layout, (1, 2)), want),
                    _off(valid(back, layout, (1, 2)), grad),
                )
    return out


@pytest.mark.parametrize("rows,cols", [(2, 2), (2, 3)], ids=str)
def test_fp8_on_the_wire_moves_little(rows: int, cols: int) -> None:
    ranks = run(rows, cols, distances, 35)
    for name in ranks[0]:
        forward, backward = (max(r[name][i] for r in ranks) for i in (0, 1))
        print(f"{rows}x{cols} {name}: {forward:.4f} forward, {backward:.4f} backward")
        assert LEAST < forward <= FORWARD, (name, forward)
        assert LEAST < backward <= BACKWARD, (name, backward)
