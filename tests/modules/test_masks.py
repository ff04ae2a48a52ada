"""Batches of complexes of different lengths through whole stacks, against stock Boltz; no batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compact import bare, error, randomise, shard, stock_in_double, tile
from ranks import run
from torch import Tensor, nn

from foldcp.fabric.mesh import Mesh
from foldcp.layout.tiles import PairLayout
from foldcp.modules.boltz1 import trunk
from foldcp.modules.trunk.msa import (
    MSAModule,
    MSAOptions,
    OuterProductMean,
    PairWeightedAveraging,
)
from foldcp.modules.trunk.pairformer import PairformerModule
from foldcp.modules.trunk.stack import TiledPairformer
from foldcp.rings.attention_pair_bias import attention_pair_bias
from foldcp.rings.triangle_attention import triangle_attention
from foldcp.rings.triangle_multiplication import triangle_multiplication

N, S, C_S, C_Z, C_M = 9, 5, 16, 12, 8
LENGTHS = (9, 6)
TYPES = 33  # of residues, Boltz's const.num_tokens
HEADS = dict(pairwise_head_width=4, pairwise_num_heads=2)
TOLERANCE = 1e-12
# A line without any key has logits near -1e9, of which float64 resolves 1e-7.
PADDING = 1e-5


def _inputs() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    batch = len(LENGTHS)
    real = (torch.arange(N) < torch.tensor(LENGTHS)[:, None]).double()
    feats = {
        "msa": torch.randint(0, TYPES, (batch, S, N), generator=g),
        "has_deletion": (normal(batch, S, N) > 0.5).double(),
        "deletion_value": normal(batch, S, N).abs(),
        "msa_paired": (normal(batch, S, N) > 0).double(),
        "msa_mask": (normal(batch, S, N) > -1).double() * real[:, None],
        "token_pad_mask": real,
    }
    pairs = real[:, :, None] * real[:, None]
    # Arguments of their own: one real token that is no key, some pairs that do not count.
    tokens = real.clone()
    tokens[0, 3] = 0
    holes = pairs * (normal(batch, N, N) > -1).double()
    holes.diagonal(dim1=1, dim2=2).copy_(real)
    return dict(
        s=normal(batch, N, C_S), z=normal(batch, N, N, C_Z), ds=normal(batch, N, C_S),
        dz=normal(batch, N, N, C_Z), real=real, pairs=pairs, tokens=tokens, holes=holes, **feats,
    )  # fmt: skip


def _stacks() -> dict[str, nn.Module]:
    # Here, so that ranks need not import Boltz.
    from boltz.model.layers.pairformer import PairformerModule as StockPairformer
    from boltz.model.modules import trunk as boltz1
    from boltz.model.modules.trunkv2 import MSAModule as StockMSA

    pair = dict(num_blocks=1, num_heads=2, **HEADS)
    msa = dict(msa_s=C_M, token_z=C_Z, msa_blocks=1, msa_dropout=0.0, z_dropout=0.0, **HEADS)
    of_one = boltz1.MSAModule(s_input_dim=C_S, subsample_msa=False, **msa)
    found = {
        "pairformer": StockPairformer(C_S, C_Z, v2=True, **pair),
        "pairformer of Boltz-1": boltz1.PairformerModule(C_S, C_Z, **pair),
        "msa": StockMSA(token_s=C_S, **msa),
        "msa of Boltz-1": of_one,
    }
    return {name: randomise(x, seed) for seed, (name, x) in enumerate(found.items())}


def _stock(name: str, stack: nn.Module, x: dict[str, Tensor]) -> list[Tensor]:
    """Results, then gradients of what counts of the inputs."""
    s, z = (x[k].clone().requires_grad_() for k in "sz")
    feats = dict(x)
    if "Boltz-1" in name:
        feats["msa"] = torch.nn.functional.one_hot(x["msa"], TYPES).double()
    with stock_in_double():
        if "msa" in name:
            out = [z + stack(z, s, feats)]
        else:
            out = list(stack(s, z, x["tokens"], x["holes"]))
    loss = (out[-1] * x["dz"] * x["pairs"][..., None]).sum()
    if len(out) == 2:
        loss = loss + (out[0] * x["ds"] * x["real"][..., None]).sum()
    return [o.detach() for o in out] + list(torch.autograd.grad(loss, (s, z)))


def _ours(
    name: str, stack: nn.Module, x: dict[str, Tensor], layout: PairLayout, masked: bool = True
) -> list[Tensor]:
    s = shard(x["s"], layout).requires_grad_()
    z = tile(x["z"], layout).requires_grad_()
    dz = tile(x["dz"] * x["pairs"][..., None], layout, 0.0)
    ds = shard(x["ds"] * x["real"][..., None], layout, 0.0)
    if "msa" in name:
        out = [stack(z, s, x, layout, token_mask=x["real"] if masked else None)]
    else:
        masks = dict(token_mask=x["tokens"], pair_mask=tile(x["holes"], layout)) if masked else {}
        out = list(stack(s, z, layout, **masks))
    loss = (out[-1] * dz).sum() + ((out[0] * ds).sum() if len(out) == 2 else 0)
    grads = torch.autograd.grad(loss, (s, z))
    with torch.no_grad():  # in place
        s, z = s.detach().clone(), z.detach().clone()
        if "msa" in name:
            again = [stack(z, s, x, layout, token_mask=x["real"] if masked else None)]
        else:
            again = list(stack(s, z, layout, **masks))
    return [*out, *grads, *again]


def _reads(twin: Any) -> MSAOptions:
    return MSAOptions(
        twin.use_paired_feature, twin.num_subsampled_msa if twin.subsample_msa else None
    )


def _stacks_agree(
    mesh: Mesh, twins: dict[str, nn.Module], wanted: dict[str, list[Tensor]], x: dict[str, Tensor]
) -> None:
    layout = PairLayout(N, mesh.rows, mesh.cols, mesh.rank)
    blocks = trunk.PairformerOptions((True,))
    kinds: tuple[Callable[[Any, Mesh], nn.Module], ...] = (
        PairformerModule,
        lambda x, mesh: trunk.PairformerModule(x, mesh, blocks),
        lambda x, mesh: MSAModule(x, mesh, _reads(x)),
        lambda x, mesh: trunk.MSAModule(x, mesh, _reads(x)),
    )
    lo, hi = layout.shard_span()
    token = slice(lo, lo + layout.valid((lo, hi)))
    (r0, r1), (c0, c1) = layout.tile_box()
    rows, cols = slice(r0, r0 + layout.valid((r0, r1))), slice(c0, c0 + layout.valid((c0, c1)))
    whole = dict(x, z=x["z"], s=x["s"])
    for (name, twin), kind in zip(twins.items(), kinds, strict=True):
        stack = kind(twin, mesh)
        results = {m: _ours(name, stack, whole, layout, m) for m in (True, False)}
        want = wanted[name]
        want = want + want[: len(want) - 2]
        worst = {True: 0.0, False: 0.0}
        for masked, got in results.items():
            for i, (a, b) in enumerate(zip(got, want, strict=True)):
                if b.ndim == 4:
                    a, b = a[:, : rows.stop - r0, : cols.stop - c0], b[:, rows, cols]
                    keep = x["pairs"][:, rows, cols] > 0
                else:
                    a, b, keep = a[:, : token.stop - lo], b[:, token], x["real"][:, token] > 0
                if keep.any():
                    worst[masked] = max(worst[masked], error(a[keep], b[keep]))
                if masked and b.numel():
                    e = error(a, b)
                    assert e < PADDING, f"{name} tensor {i}: padding is {e:.1e} off"
        assert worst[True] < TOLERANCE, f"{name}: {worst[True]:.1e}"
        if mesh.size == 1:
            assert worst[False] > 1e-3, f"{name}: masks change nothing"
    _no_batch_and_no_sequences(mesh, twins, layout)


def _no_batch_and_no_sequences(mesh: Mesh, twins: dict[str, nn.Module], layout: PairLayout) -> None:
    """Empty results, and gradients of zero, from each op of the stacks on tiles."""
    tile_of, n = (layout.tile_rows, layout.tile_cols), layout.shard

    def ran(result: object, inputs: list[Tensor], weights: list[Tensor]) -> None:
        (out,) = result if isinstance(result, tuple) else (result,)
        grads = torch.autograd.grad(out.sum(), [*inputs, *weights])
        assert not out.isnan().any()
        assert all(g.shape == x.shape for g, x in zip(grads, inputs, strict=False))
        assert all(not g.any() for g in grads[len(inputs) :])

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, requires_grad=True)

    for multiplication, attention in (("panel-direct", "panel-direct"), ("channel", "rows")):
        mesh = mesh.with_policy(multiplication=multiplication, attention=attention)
        layer = PairformerModule(twins["pairformer"], mesh).requires_grad_().layers[0]
        z = zeros(0, *tile_of, C_Z)
        for op in (layer.tri_mul_out, layer.tri_mul_in):
            out, keep = op is layer.tri_mul_out, z[..., 0].detach()
            made = triangle_multiplication(z, keep, op.weights(), out, layout, mesh)
            ran(made, [z], list(op.parameters()))
        for op in (layer.tri_att_start, layer.tri_att_end):
            start = op is layer.tri_att_start
            made = triangle_attention(z, None, op.weights(), start, layout, mesh)
            ran(made, [z], list(op.parameters()))
        s = zeros(0, n, C_S)
        assert all(x.numel() == 0 for x in layer(s, z, layout))
        with torch.no_grad():
            assert all(x.numel() == 0 for x in layer(s.detach(), z.detach(), layout))
    q = zeros(0, n, 2, 4)
    ran(attention_pair_bias(q, q, q, zeros(0, 2, *tile_of), 1.0, layout, mesh), [q], [])
    layer = twins["msa"].requires_grad_().layers[0]
    average = PairWeightedAveraging(layer.pair_weighted_averaging, mesh)
    outer = OuterProductMean(layer.outer_product_mean, mesh)
    for batch, sequences in ((0, S), (2, 0), (0, 0)):
        m, z = zeros(batch, sequences, n, C_M), zeros(batch, *tile_of, C_Z)
        ran(average(m, z, layout), [m, z], list(average.parameters()))
        out = outer(z, m, m[..., 0].detach(), layout)
        ran(out, [z, m], [outer.proj_o.weight])
        assert torch.equal(out, z + outer.proj_o.bias)
        with torch.no_grad():
            assert average(m.detach(), z.detach(), layout).shape == m.shape
            assert torch.equal(outer(z.detach().clone(), m.detach(), m[..., 0], layout), out)


@pytest.mark.parametrize("rows,cols", [(1, 1), (2, 2)])
def test_stacks_take_masks_of_each_element_as_stock_does(rows: int, cols: int) -> None:
    x, twins = _inputs(), _stacks()
    wanted = {name: _stock(name, stack, x) for name, stack in twins.items()}
    run(rows, cols, _stacks_agree, {k: bare(v) for k, v in twins.items()}, wanted, x)


def test_masks_of_another_batch_are_refused() -> None:
    mesh = Mesh.create(1, 1)
    stack = TiledPairformer([], mesh)
    s, z = torch.zeros(1, N, C_S), torch.zeros(1, N, N, C_Z)
    for name, mask in (("token_mask", torch.ones(2, N)), ("pair_mask", torch.ones(2, N, N))):
        with pytest.raises(ValueError, match=f"`{name}` has a batch of 2, but `z` one of 1"):
            stack(s, z, mesh.layout(N), **{name: mask})


def test_a_tile_without_its_batch_is_told_what_is_expected() -> None:
    layout = Mesh.create(1, 1).layout(9)
    for shape, last, expected in (
        ((9, 9), True, r"\[B, 9, 9\]"),
        ((2, 8, 9, 4), True, r"\[2, 9, 9, 4\]"),
        ((2, 8, 9), False, r"\[B, C, 9, 9\]"),
        ((2, 4, 8, 9), False, r"\[2, 4, 9, 9\]"),
    ):
        with pytest.raises(ValueError, match=f"expects {expected}$"):
            layout.check(torch.zeros(shape), channels_last=last)
