"""Every distributed op against its float64 definition, on every mesh, gradients included."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
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
TOLERANCE = 1e-12  # relative, float64
# Every strategy on every mesh; the ring differs from the panels it takes the place of in the order
# of senders alone, which two meshes show.
MULTIPLICATION = ("panel-direct", "channel")
ATTENTION = ("panel-direct", "rows")
RING = "panel-ring"
RING_MESHES = [(2, 2), (2, 3)]
# With every key of a line masked, all logits are near -1e9, where float64 itself resolves 1e-7:
# the definition is no more exact than that.
ALL_MASKED = 1e-6


def _rand(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def _pad_tile(x: Tensor, layout: PairLayout, dims: tuple[int, int], fill: float = 7.0) -> Tensor:
    """This rank's tile of a whole tensor; padding holds junk that must never matter."""
    out = x
    for d, span in zip(dims, layout.tile_box(), strict=True):
        shape = list(out.shape)
        shape[d] = layout.padded - layout.n
        out = torch.cat((out, out.new_full(shape, fill)), d).narrow(d, span[0], span[1] - span[0])
    return out.clone()


def _pad_shard(x: Tensor, layout: PairLayout, dim: int, fill: float = 7.0) -> Tensor:
    shape = list(x.shape)
    shape[dim] = layout.padded - layout.n
    lo, hi = layout.shard_span()
    return torch.cat((x, x.new_full(shape, fill)), dim).narrow(dim, lo, hi - lo).clone()


def _error(got: Tensor, want: Tensor) -> float:
    if want.numel() == 0:
        return 0.0
    return ((got - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()


def _check(
    name: str, mesh: Mesh, n: int, pairs: list[tuple[Tensor, Tensor]], tolerance: float = TOLERANCE
) -> None:
    for i, (got, want) in enumerate(pairs):
        e = _error(got, want)
        assert e <= tolerance, f"{name} N={n} mesh {mesh.rows}x{mesh.cols} tensor {i}: {e:.2e}"


def _valid(x: Tensor, layout: PairLayout, dims: tuple[int, int]) -> Tensor:
    for d, span in zip(dims, layout.tile_box(), strict=True):
        x = x.narrow(d, 0, layout.valid(span))
    return x


def _whole(x: Tensor, layout: PairLayout, dims: tuple[int, int]) -> Tensor:
    for d, (lo, _), span in zip(dims, layout.tile_box(), layout.tile_box(), strict=True):
        x = x.narrow(d, min(lo, layout.n), layout.valid(span))
    return x


def _tile_op(name, layout, z, mask, weights, meshes, ours, theirs, tolerance=TOLERANCE) -> None:
    """Forward in place, forward and backward with gradients, against the definition.

    `meshes`: one per strategy, by its name; `ours` is called with each, `theirs` once.
    """
    whole = z.clone().requires_grad_()
    ws = [w.clone().requires_grad_() for w in weights]
    want = theirs(whole, mask, ws)
    g = torch.Generator().manual_seed(5)
    dout = _rand(g, *want.shape)
    grads = torch.autograd.grad(want, [whole, *ws], dout)
    tile, tmask = _pad_tile(z, layout, (1, 2)), _pad_tile(mask, layout, (1, 2), 0.0)
    dtile = _pad_tile(dout, layout, (1, 2), 0.0)
    d = (1, 2)
    for strategy, mesh in meshes.items():
        own = tile.clone()
        with torch.no_grad():
            got = ours(mesh, own, tmask, weights)
        assert got.data_ptr() == own.data_ptr(), f"{name} {strategy} is not in place"
        leaf = tile.clone().requires_grad_()
        lws = [w.clone().requires_grad_() for w in weights]
        out = ours(mesh, leaf, tmask, lws)
        mine = torch.autograd.grad(out, [leaf, *lws], dtile)
        assert torch.equal(leaf, tile), f"{name} {strategy} changed z with gradients on"
        pairs = [
            (_valid(got, layout, d), _whole(want, layout, d)),
            (_valid(out, layout, d), _whole(want, layout, d)),
            (_valid(mine[0], layout, d), _whole(grads[0], layout, d)),
        ]
        # Parameters are replicated: their gradients add up over the ranks.
        total = [torch.stack(x).sum(0) for x in zip(*_gathered(mesh, mine[1:]), strict=True)]
        pairs += zip(total, grads[1:], strict=True)
        _check(f"{name} {strategy}", mesh, layout.n, pairs, tolerance)


def _gathered(mesh: Mesh, tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """The tensors of all ranks, in one message each."""
    flat = mesh.ranks.all_gather_object(torch.cat([x.flatten() for x in tensors]))
    sizes = [x.numel() for x in tensors]
    return [[p.view_as(x) for p, x in zip(f.split(sizes), tensors, strict=True)] for f in flat]


def _by_strategy(mesh: Mesh, op: str, names: tuple[str, ...]) -> dict[str, Mesh]:
    names += (RING,) if (mesh.rows, mesh.cols) in RING_MESHES else ()
    return {name: mesh.with_policy(**{op: name}) for name in names}


def triangles(mesh: Mesh, n: int) -> None:
    layout = PairLayout(n, mesh.rows, mesh.cols, mesh.rank)
    g = torch.Generator().manual_seed(n)
    b, c, d, h, hidden = 2, 6, 8, 2, 12
    z = _rand(g, b, n, n, c)
    mask = (torch.rand(b, n, n, generator=g) > 0.2).double()
    mask.diagonal(dim1=1, dim2=2).fill_(1)
    dead = mask.clone()
    dead[0, n // 2], dead[1, :, n // 3] = 0, 0
    dead[1, n // 2] *= 0.6  # a line of soft masks, in whose panels other masks are the largest
    dead[1, n // 2, ::3] = 0.4
    # In chunks of at most one channel per rank, the last leaves ranks of the larger meshes without.
    shapes = [(c,), (c,), *[(2 * hidden, c)] * 2, (hidden,), (hidden,), (c, hidden), (c, c)]
    weights = [_rand(g, *s) * 0.5 + (len(s) == 1) for s in shapes]
    for outgoing in (True, False):
        _tile_op(
            f"triangle multiplication outgoing={outgoing}",
            layout,
            z,
            mask,
            weights,
            _by_strategy(mesh, "multiplication", MULTIPLICATION),
            lambda way, x, m, w, o=outgoing: triangle_multiplication(
                x, m, TriangleMultiplicationWeights(*w), o, layout, way
            ),
            lambda x, m, w, o=outgoing: reference.triangle_multiplication(
                x, m, TriangleMultiplicationWeights(*w), o
            ),
        )
    shapes = [(c,), (c,), (h, c), *[(d, c)] * 4, (c, d)]
    weights = [_rand(g, *s) * 0.5 + (len(s) == 1) for s in shapes]
    masks = (mask, dead, torch.ones_like(mask))
    for starting in (True, False):
        for m in masks:
            full = bool((m == 1).all())
            _tile_op(
                f"triangle attention starting={starting} full={full} dead={m is dead}",
                layout,
                z,
                m,
                weights,
                _by_strategy(mesh, "attention", ATTENTION),
                lambda way, x, m, w, s=starting, f=full: triangle_attention(
                    x, None if f else m, TriangleAttentionWeights(*w, h), s, layout, way
                ),
                lambda x, m, w, s=starting: reference.triangle_attention(
                    x, m, TriangleAttentionWeights(*w, h), s
                ),
                ALL_MASKED if m is dead else TOLERANCE,
            )


def tokens(mesh: Mesh, n: int) -> None:
    layout = PairLayout(n, mesh.rows, mesh.cols, mesh.rank)
    g = torch.Generator().manual_seed(n)
    m, h, d, s, c = 2, 3, 5, 7, 6
    # Attention with pair bias.
    q, k, v = (_rand(g, m, n, h, d) for _ in range(3))
    bias, dout = _rand(g, 1, h, n, n), _rand(g, m, n, h, d)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, bias)]
    want = reference.attention_pair_bias(*leaves, 0.3)
    grads = torch.autograd.grad(want, leaves, dout)
    local = [_pad_shard(x, layout, 1).requires_grad_() for x in (q, k, v)]
    local.append(_pad_tile(bias, layout, (2, 3)).requires_grad_())
    got = attention_pair_bias(*local, 0.3, layout, mesh)
    mine = torch.autograd.grad(got, local, _pad_shard(dout, layout, 1, 0.0))
    lo, hi = layout.shard_span()
    real = slice(min(lo, n), min(hi, n))
    keep = layout.valid((lo, hi))
    pairs = [(got[:, :keep], want[:, real])]
    pairs += [(a[:, :keep], b[:, real]) for a, b in zip(mine[:3], grads[:3], strict=True)]
    pairs.append((_valid(mine[3], layout, (2, 3)), _whole(grads[3], layout, (2, 3))))
    with torch.no_grad():
        pairs.append((attention_pair_bias(*local, 0.3, layout, mesh)[:, :keep], want[:, real]))
    _check("attention pair bias", mesh, n, pairs)
    # Pair weighted averaging.
    v, logits = _rand(g, 1, s, n, h, d), _rand(g, 1, h, n, n)
    leaves = [v.clone().requires_grad_(), logits.clone().requires_grad_()]
    want = reference.pair_weighted_averaging(*leaves)
    dout = _rand(g, *want.shape)
    grads = torch.autograd.grad(want, leaves, dout)
    lv = _pad_shard(v, layout, 2).requires_grad_()
    ll = _pad_tile(logits, layout, (2, 3)).requires_grad_()
    got = pair_weighted_averaging(lv, column_weights(ll, layout, mesh), layout, mesh)
    mine = torch.autograd.grad(got, [lv, ll], _pad_shard(dout, layout, 2, 0.0))
    pairs = [(got[:, :, :keep], want[:, :, real]), (mine[0][:, :, :keep], grads[0][:, :, real])]
    pairs.append((_valid(mine[1], layout, (2, 3)), _whole(grads[1], layout, (2, 3))))
    _check("pair weighted averaging", mesh, n, pairs)
    # Outer product mean, with few and with many sequences (two orders of contraction).
    for seqs in (s, 60):
        z, w, wb = _rand(g, 1, n, n, c), _rand(g, c, d * d), _rand(g, c)
        a, b = _rand(g, 1, seqs, n, d), _rand(g, 1, seqs, n, d)
        mask = (torch.rand(1, seqs, n, generator=g) > 0.3).double()
        a, b = a * mask[..., None], b * mask[..., None]
        leaves = [x.clone().requires_grad_() for x in (z, a, b, w, wb)]
        want = reference.outer_product_mean(*leaves[:3], mask, *leaves[3:])
        dout = _rand(g, *want.shape)
        grads = torch.autograd.grad(want, leaves, dout)
        local = [_pad_tile(z, layout, (1, 2))]
        local += [_pad_shard(x, layout, 2, 0.0) for x in (a, b)]
        local = [x.requires_grad_() for x in (*local, w.clone(), wb.clone())]
        lm = _pad_shard(mask, layout, 2, 0.0)
        got = outer_product_mean(*local[:3], lm, *local[3:], layout, mesh)
        mine = torch.autograd.grad(got, local, _pad_tile(dout, layout, (1, 2), 0.0))
        t = (1, 2)
        pairs = [(_valid(got, layout, t), _whole(want, layout, t))]
        pairs.append((_valid(mine[0], layout, t), _whole(grads[0], layout, t)))
        pairs += [(mine[i][:, :, :keep], grads[i][:, :, real]) for i in (1, 2)]
        pairs += [(sum(mesh.ranks.all_gather_object(mine[i])), grads[i]) for i in (3, 4)]
        _check(f"outer product mean S={seqs}", mesh, n, pairs)


def offsets(mesh: Mesh, n: int) -> None:
    """Float32 with offsets that all keys of a row share, or the keys of some ranks."""
    layout = PairLayout(n, mesh.rows, mesh.cols, mesh.rank)
    g = torch.Generator().manual_seed(n)
    m, h, d = 2, 2, 4
    q, k, v = (_rand(g, m, n, h, d).float() for _ in range(3))
    by_row = torch.tensor([0.0, -1e9, -1e30, 1e9, 3e38])[torch.arange(n) % 5]
    some = torch.where(torch.arange(n) < n // 2, by_row[:, None], 0.0)
    for fill in (by_row[:, None].expand(n, n), some):
        bias = fill.expand(1, h, n, n).contiguous()
        want = reference.attention_pair_bias(*(x.double() for x in (q, k, v, bias)), 0.3)
        local = [_pad_shard(x, layout, 1) for x in (q, k, v)]
        local.append(_pad_tile(bias, layout, (2, 3)))
        lo, hi = layout.shard_span()
        real, keep = slice(min(lo, n), min(hi, n)), layout.valid((lo, hi))
        pairs = []
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                inputs = [x.clone().requires_grad_(grad) for x in local]
                got = attention_pair_bias(*inputs, 0.3, layout, mesh).detach()
            pairs.append((got[:, :keep], want[:, real]))
        _check("offsets, attention pair bias", mesh, n, pairs, 5e-6)
        whole = reference.pair_weighted_averaging(v.double()[:1, None], bias.double())
        weights = column_weights(_pad_tile(bias, layout, (2, 3)), layout, mesh)
        got = pair_weighted_averaging(local[2][:1, None], weights, layout, mesh)
        pairs = [(got[:, :, :keep], whole[:, :, real])]
        _check("offsets, pair weighted averaging", mesh, n, pairs, 5e-6)
    # Lines without a kept key: all their keys by their logits, whatever the panels.
    shapes = [(4,), (4,), (h, 4), *[(8, 4)] * 4, (4, 8)]
    weights = [_rand(g, *s) for s in shapes]
    z, mask = _rand(g, 1, n, n, 4), torch.zeros(1, n, n)
    want = reference.triangle_attention(
        z, mask.double(), TriangleAttentionWeights(*weights, h), True
    )
    single = TriangleAttentionWeights(*(w.float() for w in weights), h)
    tile, tmask = (_pad_tile(x, layout, (1, 2), 0.0) for x in (z.float(), mask))
    for strategy, way in _by_strategy(mesh, "attention", ATTENTION).items():
        with torch.no_grad():
            got = triangle_attention(tile.clone(), tmask, single, True, layout, way)
        pair = (_valid(got, layout, (1, 2)), _whole(want, layout, (1, 2)))
        _check(f"offsets, dead lines {strategy}", mesh, n, [pair], 1e-5)


def every_op(mesh: Mesh) -> None:
    offsets(mesh, SIZES[1])
    for n in SIZES:
        # Many small chunks at one size, whole tiles at the others.
        chunking.set_chunk_bytes(4096 if n == SIZES[1] else None)
        triangles(mesh, n)
        tokens(mesh, n)


@pytest.mark.parametrize("rows,cols", MESHES, ids=lambda v: str(v))
def test_ops_match_their_definition(rows: int, cols: int) -> None:
    run(rows, cols, every_op)
