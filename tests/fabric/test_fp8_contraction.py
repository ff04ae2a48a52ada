"""The FP8 contraction on every mesh: the planes of one rank bit for bit, and no more bytes."""

from __future__ import annotations

import pytest
import torch
from cutting import check, pad_tile, rand, valid, whole
from ranks import run

from foldcp.fabric.mesh import Mesh
from foldcp.fabric.policy import STRATEGIES
from foldcp.layout.tiles import PairLayout
from foldcp.rings.triangle_multiplication import contraction, triangle_multiplication
from foldcp_kernels.core import chunking
from foldcp_kernels.triangle_multiplication import TriangleMultiplicationWeights, definition
from foldcp_kernels.triangle_multiplication.parts import chosen

MESHES = [(1, 1), (1, 2), (2, 2), (2, 3)]
B, C, HIDDEN = 2, 6, 12
SIZES = ((1, None), (17, 4096), (30, None))  # tokens, bytes of a chunk
# Float64: another order of the sum. One plane that rounds another way is off by 1e-4 at least.
TOLERANCE = 1e-12


def against_definition(mesh: Mesh, strategy: str) -> None:
    for n, chunk in SIZES:
        chunking.set_chunk_bytes(chunk)
        layout = PairLayout(n, mesh.rows, mesh.cols, mesh.rank)
        g = torch.Generator().manual_seed(n)
        z, mask = rand(g, B, n, n, C), (torch.rand(B, n, n, generator=g) > 0.2).double()
        shapes = [(C,), (C,), *[(2 * HIDDEN, C)] * 2, (HIDDEN,), (HIDDEN,), (C, HIDDEN), (C, C)]
        w = TriangleMultiplicationWeights(*(rand(g, *s) * 0.5 + (len(s) == 1) for s in shapes))
        tile, tmask = pad_tile(z, layout, (1, 2)), pad_tile(mask, layout, (1, 2), 0.0)
        for outgoing in (True, False):
            want = definition.contraction(z, mask, w, outgoing, fp8=True)
            received = {}
            for asked in ("same", "fp8"):
                # FP8 planes travel as they are: the wire rounds nothing again.
                wire = "raw" if asked == "same" or strategy == "channel" else "fp8"
                one = mesh.with_policy(multiplication=strategy, contraction=asked, wire=wire)
                before = mesh.traffic.received["triangle_multiplication"]
                with torch.no_grad():
                    given = tile, tmask, w, outgoing, layout, one
                    got = contraction(*given, chosen(tile, w, asked))
                received[asked] = one.traffic.received["triangle_multiplication"] - before
            got = got.permute(0, 2, 3, 1)
            pairs = [(valid(got, layout, (1, 2)), whole(want, layout, (1, 2)))]
            check(f"{strategy} {outgoing}", mesh, n, pairs, TOLERANCE)
            # Of channels two planes go there, and one product comes back; pieces of a message are
            # aligned, which counts where they are small.
            part = 1 / 8 if strategy != "channel" else (2 + 8) / (3 * 8)
            if n == SIZES[-1][0]:
                assert received["fp8"] <= 1.02 * part * received["same"], received
    chunking.set_chunk_bytes(None)


@pytest.mark.parametrize("strategy", STRATEGIES["triangle_multiplication"][1:])
@pytest.mark.parametrize(("rows", "cols"), MESHES)
def test_every_mesh_contracts_the_planes_of_one_rank(rows: int, cols: int, strategy: str) -> None:
    run(rows, cols, against_definition, strategy)


def test_torch_distributed_carries_fp8_planes() -> None:
    run(1, 2, against_definition, "panel-direct", transport="gloo")


def test_gradients_are_refused() -> None:
    mesh = Mesh.create(1, 1, "cpu", contraction="fp8")
    g = torch.Generator().manual_seed(0)
    shapes = [(C,), (C,), *[(2 * HIDDEN, C)] * 2, (HIDDEN,), (HIDDEN,), (C, HIDDEN), (C, C)]
    w = TriangleMultiplicationWeights(*(rand(g, *s) for s in shapes))
    with pytest.raises(ValueError, match=r"no gradients: call it under torch\.no_grad\(\)"):
        triangle_multiplication(rand(g, 1, 4, 4, C), None, w, True, PairLayout(4, 1, 1, 0), mesh)
