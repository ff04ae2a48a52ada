"""Every distributed op against its float64 definition, on every mesh, gradients included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cutting import TOLERANCE, check, gathered, pad_shard, pad_tile, rand, shard, valid, whole
from ranks import run
from torch import Tensor

from foldcp.fabric.mesh import Mesh
from foldcp.layout.tiles import PairLayout
from foldcp.rings.attention_pair_bias import attention_pair_bias
from foldcp.rings.outer_product_mean import outer_product_mean
from foldcp.rings.pair_weighted_averaging import column_weights, pair_weighted_averaging
from foldcp.rings.triangle_attention import triangle_attention
from foldcp.rings.triangle_multiplication import triangle_multiplication
from foldcp_kernels.core import chunking
from foldcp_kernels.core import definitions as reference
from foldcp_kernels.triangle_attention import TriangleAttentionWeights
from foldcp_kernels.triangle_multiplication import TriangleMultiplicationWeights

MESHES = [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (3, 3)]
SIZES = (1, 17, 30)  # one token, odd, a multiple of no mesh larger than 2x3
# On every mesh; the ring, which differs from the panels in the order of senders alone, on two.
STRATEGIES = {
    "triangle_multiplication": ("panel-direct", "channel", "panel-ring"),
    "triangle_attention": ("panel-direct", "rows", "panel-ring"),
}
RING_MESHES = [(2, 2), (2, 3)]
# With every key of a line masked, all logits are near -1e9, where float64 itself resolves 1e-7:
# the definition is no more exact than that.
ALL_MASKED = 1e-6
B, C, H = 2, 6, 2  # batch, channels and heads of the triangle ops


def _tile_op(name, layout, z, mask, weights, mesh, ours, theirs, tolerance=TOLERANCE) -> None:
    """Forward in place, forward and backward with gradients, against the definition."""
    full = z.clone().requires_grad_()
    ws = [w.clone().requires_grad_() for w in weights]
    want = theirs(full, mask, ws)
    dout = rand(torch.Generator().manual_seed(5), *want.shape)
    grads = torch.autograd.grad(want, [full, *ws], dout)
    tile, tmask = pad_tile(z, layout, (1, 2)), pad_tile(mask, layout, (1, 2), 0.0)
    dtile = pad_tile(dout, layout, (1, 2), 0.0)
    d = (1, 2)
    own = tile.clone()
    with torch.no_grad():
        got = ours(own, tmask, weights)
    assert got.data_ptr() == own.data_ptr(), f"{name} is not in place"
    leaf = tile.clone().requires_grad_()
    lws = [w.clone().requires_grad_() for w in weights]
    out = ours(leaf, tmask, lws)
    mine = torch.autograd.grad(out, [leaf, *lws], dtile)
    assert torch.equal(leaf, tile), f"{name} changed z with gradients on"
    pairs = [
        (valid(got, layout, d), whole(want, layout, d)),
        (valid(out, layout, d), whole(want, layout, d)),
        (valid(mine[0], layout, d), whole(grads[0], layout, d)),
    ]
    # Parameters are replicated: their gradients add up over the ranks.
    total = [torch.stack(x).sum(0) for x in zip(*gathered(mesh, mine[1:]), strict=True)]
    pairs += zip(total, grads[1:], strict=True)
    check(name, mesh, layout.n, pairs, tolerance)


def _pairs(n: int) -> tuple[torch.Generator, Tensor, Tensor]:
    """(generator, z, mask) of N tokens, for the triangle ops."""
    g = torch.Generator().manual_seed(n)
    z = rand(g, B, n, n, C)
    mask = (torch.rand(B, n, n, generator=g) > 0.2).double()
    mask.diagonal(dim1=1, dim2=2).fill_(1)
    return g, z, mask


def _weights(g: torch.Generator, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    return [rand(g, *s) * 0.5 + (len(s) == 1) for s in shapes]


def multiplication(mesh: Mesh, n: int) -> None:
    layout = PairLayout(n, mesh.rows, mesh.cols, mesh.rank)
    g, z, mask = _pairs(n)
    # In chunks of at most one channel per rank, the last leaves ranks of the larger meshes without.
    hidden = 12
    weights = _weights(
        g, [(C,), (C,), *[(2 * hidden, C)] * 2, (hidden,), (hidden,), (C, hidden), (C, C)]
    )
    for outgoing in (True, False):
        _tile_op(
            f"triangle multiplication outgoing={outgoing}",
            layout,
            z,
            mask,
            weights,
            mesh,
            lambda x, m, w, o=outgoing: triangle_multiplication(
                x, m, TriangleMultiplicationWeights(*w), o, layout, mesh
            ),
            lambda x, m, w, o=outgoing: reference.triangle_multiplication(
                x, m, TriangleMultiplicationWeights(*w), o
            ),
        )


def attention(mesh: Mesh, n: int) -> None:
    layout = PairLayout(n, mesh.rows, mesh.cols, mesh.rank)
    g, z, mask = _pairs(n)
    dead = mask.clone()
    dead[0, n // 2], dead[1, :, n // 3] = 0, 0
    dead[1, n // 2] *= 0.6  # a line of soft masks, in whose panels other masks are the largest
    dead[1, n // 2, ::3] = 0.4
    weights = _weights(g, [(C,), (C,), (H, C), *[(8, C)] * 4, (C, 8)])
    for starting in (True, False):
        for m in (mask, dead, torch.ones_like(mask)):
            full = bool((m == 1).all())
            _tile_op(
                f"triangle attention starting={starting} full={full} dead={m is dead}",
                layout,
                z,
                m,
                weights,
                mesh,
                lambda x, m, w, s=starting, f=full: triangle_attention(
                    x, None if f else m, TriangleAttentionWeights(*w, H), s, layout, mesh
                ),
                lambda x, m, w, s=starting: reference.triangle_attention(
                    x, m, TriangleAttentionWeights(*w, H), s
                ),
                ALL_MASKED if m is dead else TOLERANCE,
            )


def pair_bias(mesh: Mesh, n: int) -> None:
    layout = PairLayout(n, mesh.rows, mesh.cols, mesh.rank)
    g = torch.Generator().manual_seed(n)
    m, h, d = 2, 3, 5
    q, k, v = (rand(g, m, n, h, d) for _ in range(3))
    bias, dout = rand(g, 1, h, n, n), rand(g, m, n, h, d)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, bias)]
    want = reference.attention_pair_bias(*leaves, 0.3)
    grads = torch.autograd.grad(want, leaves, dout)
    local = [pad_shard(x, layout, 1).requires_grad_() for x in (q, k, v)]
    local.append(pad_tile(bias, layout, (2, 3)).requires_grad_())
    got = attention_pair_bias(*local, 0.3, layout, mesh)
    mine = torch.autograd.grad(got, local, pad_shard(dout, layout, 1, 0.0))
    real, keep = shard(layout)
    pairs = [(got[:, :keep], want[:, real])]
    pairs += [(a[:, :keep], b[:, real]) for a, b in zip(mine[:3], grads[:3], strict=True)]
    pairs.append((valid(mine[3], layout, (2, 3)), whole(grads[3], layout, (2, 3))))
    with torch.no_grad():
        pairs.append((attention_pair_bias(*local, 0.3, layout, mesh)[:, :keep], want[:, real]))
    check("attention pair bias", mesh, n, pairs)


def averaging(mesh: Mesh, n: int) -> None:
    layout = PairLayout(n, mesh.rows, mesh.cols, mesh.rank)
    g = torch.Generator().manual_seed(n)
    h, d, s = 3, 5, 7
    real, keep = shard(layout)
    v, logits = rand(g, 1, s, n, h, d), rand(g, 1, h, n, n)
    leaves = [v.clone().requires_grad_(), logits.clone().requires_grad_()]
    want = reference.weighted_average(*leaves)
    dout = rand(g, *want.shape)
    grads = torch.autograd.grad(want, leaves, dout)
    lv = pad_shard(v, layout, 2).requires_grad_()
    ll = pad_tile(logits, layout, (2, 3)).requires_grad_()
    got = pair_weighted_averaging(lv, column_weights(ll, layout, mesh), layout, mesh)
    mine = torch.autograd.grad(got, [lv, ll], pad_shard(dout, layout, 2, 0.0))
    pairs = [(got[:, :, :keep], want[:, :, real]), (mine[0][:, :, :keep], grads[0][:, :, real])]
    pairs.append((valid(mine[1], layout, (2, 3)), whole(grads[1], layout, (2, 3))))
    check("pair weighted averaging", mesh, n, pairs)


def outer_product(mesh: Mesh, n: int) -> None:
    """With few and with many sequences (two orders of contraction)."""
    layout = PairLayout(n, mesh.rows, mesh.cols, mesh.rank)
    g = torch.Generator().manual_seed(n)
    d, c = 5, 6
    real, keep = shard(layout)
    for seqs in (7, 60):
        z, w, wb = rand(g, 1, n, n, c), rand(g, c, d * d), rand(g, c)
        a, b = rand(g, 1, seqs, n, d), rand(g, 1, seqs, n, d)
        mask = (torch.rand(1, seqs, n, generator=g) > 0.3).double()
        a, b = a * mask[..., None], b * mask[..., None]
        leaves = [x.clone().requires_grad_() for x in (z, a, b, w, wb)]
        want = reference.outer_product_mean(*leaves[:3], mask, *leaves[3:])
        dout = rand(g, *want.shape)
        grads = torch.autograd.grad(want, leaves, dout)
        local = [pad_tile(z, layout, (1, 2))]
        local += [pad_shard(x, layout, 2, 0.0) for x in (a, b)]
        local = [x.requires_grad_() for x in (*local, w.clone(), wb.clone())]
        lm = pad_shard(mask, layout, 2, 0.0)
        got = outer_product_mean(*local[:3], lm, *local[3:], layout, mesh)
        mine = torch.autograd.grad(got, local, pad_tile(dout, layout, (1, 2), 0.0))
        t = (1, 2)
        both = ((got, want), (mine[0], grads[0]))
        pairs = [(valid(a, layout, t), whole(b, layout, t)) for a, b in both]
        pairs += [(mine[i][:, :, :keep], grads[i][:, :, real]) for i in (1, 2)]
        pairs += [(sum(mesh.ranks.all_gather_object(mine[i])), grads[i]) for i in (3, 4)]
        check(f"outer product mean S={seqs}", mesh, n, pairs)


def _offsets(n: int) -> Iterator[Tensor]:
    """Float32 biases [N, N] with offsets that all keys of a row share, or some of them."""
    by_row = torch.tensor([0.0, -1e9, -1e30, 1e9, 3e38])[torch.arange(n) % 5]
    yield by_row[:, None].expand(n, n)
    yield torch.where(torch.arange(n) < n // 2, by_row[:, None], 0.0)


def pair_bias_offsets(mesh: Mesh, n: int) -> None:
    layout = PairLayout(n, mesh.rows, mesh.cols, mesh.rank)
    g = torch.Generator().manual_seed(n)
    m, h, d = 2, 2, 4
    q, k, v = (rand(g, m, n, h, d).float() for _ in range(3))
    real, keep = shard(layout)
    for fill in _offsets(n):
        bias = fill.expand(1, h, n, n).contiguous()
        want = reference.attention_pair_bias(*(x.double() for x in (q, k, v, bias)), 0.3)
        local = [pad_shard(x, layout, 1) for x in (q, k, v)]
        local.append(pad_tile(bias, layout, (2, 3)))
        pairs = []
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                inputs = [x.clone().requires_grad_(grad) for x in local]
                got = attention_pair_bias(*inputs, 0.3, layout, mesh).detach()
            pairs.append((got[:, :keep], want[:, real]))
        check("offsets, attention pair bias", mesh, n, pairs, 5e-6)


def averaging_offsets(mesh: Mesh, n: int) -> None:
    layout = PairLayout(n, mesh.rows, mesh.cols, mesh.rank)
    v = rand(torch.Generator().manual_seed(n), 1, 1, n, 2, 4).float()
    real, keep = shard(layout)
    for fill in _offsets(n):
        bias = fill.expand(1, 2, n, n).contiguous()
        want = reference.weighted_average(v.double(), bias.double())
        weights = column_weights(pad_tile(bias, layout, (2, 3)), layout, mesh)
        got = pair_weighted_averaging(pad_shard(v, layout, 2), weights, layout, mesh)
        pair = (got[:, :, :keep], want[:, :, real])
        check("offsets, pair weighted averaging", mesh, n, [pair], 5e-6)


def dead_lines(mesh: Mesh, n: int) -> None:
    """Lines without a kept key: all their keys by their logits, whatever the panels."""
    layout = PairLayout(n, mesh.rows, mesh.cols, mesh.rank)
    g = torch.Generator().manual_seed(n)
    weights = [rand(g, *s) for s in [(4,), (4,), (H, 4), *[(8, 4)] * 4, (4, 8)]]
    z, mask = rand(g, 1, n, n, 4), torch.zeros(1, n, n)
    want = reference.triangle_attention(
        z, mask.double(), TriangleAttentionWeights(*weights, H), True
    )
    single = TriangleAttentionWeights(*(w.float() for w in weights), H)
    tile, tmask = (pad_tile(x, layout, (1, 2), 0.0) for x in (z.float(), mask))
    with torch.no_grad():
        got = triangle_attention(tile.clone(), tmask, single, True, layout, mesh)
    t = (1, 2)
    check("dead lines", mesh, n, [(valid(got, layout, t), whole(want, layout, t))], 1e-5)


OPS = {
    "triangle_multiplication": (multiplication, SIZES),
    "triangle_attention": (attention, SIZES),
    "triangle_attention_dead_lines": (dead_lines, SIZES[1:2]),
    "attention_pair_bias": (pair_bias, SIZES),
    "attention_pair_bias_offsets": (pair_bias_offsets, SIZES[1:2]),
    "pair_weighted_averaging": (averaging, SIZES),
    "pair_weighted_averaging_offsets": (averaging_offsets, SIZES[1:2]),
    "outer_product_mean": (outer_product, SIZES),
}


def _items() -> Iterator[Any]:
    """(op, strategy, rows, cols), the strategy "" for an op that has one way only."""
    for op in OPS:
        for strategy in STRATEGIES.get(op.removesuffix("_dead_lines"), ("",)):
            for rows, cols in MESHES:
                if strategy != "panel-ring" or (rows, cols) in RING_MESHES:
                    name = "-".join(filter(None, (op, strategy, f"{rows}x{cols}")))
                    yield pytest.param(op, strategy, rows, cols, id=name)


def at_every_size(mesh: Mesh, op: str, strategy: str) -> None:
    against_definition, sizes = OPS[op]
    if strategy:
        mesh = mesh.with_policy(**{op.split("_")[1]: strategy})
    for n in sizes:
        # Many small chunks at one size, whole tiles at the others.
        chunking.set_chunk_bytes(4096 if n == SIZES[1] and sizes == SIZES else None)
        against_definition(mesh, n)
    chunking.set_chunk_bytes(None)


@pytest.mark.parametrize(("op", "strategy", "rows", "cols"), list(_items()))
def test_ops(op: str, strategy: str, rows: int, cols: int) -> None:
    run(rows, cols, at_every_size, op, strategy)
