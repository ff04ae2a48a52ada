"""A pairformer from plain weights: another architecture's, and what no architecture here has."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compact import error
from ranks import run
from torch import Tensor, nn

import foldcp
from foldcp.fabric.mesh import Mesh
from foldcp.modules.graphs.weight_slots import WeightSlots, signature
from foldcp.modules.trunk.masks import stack_masks

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "porting")
BOUND = 1e-9  # of the issue; what is found is about 1e-15
N, C, C_S, HEADS, WIDTH = 11, 6, 8, 3, 5


def _example() -> ModuleType:
    if EXAMPLE not in sys.path:
        sys.path.append(EXAMPLE)
    import pairformer_on_a_mesh

    return pairformer_on_a_mesh


def _equals_the_other_architecture(mesh: Mesh, n: int, masked: bool) -> None:
    example = _example()
    model = example.model()
    s, z, mask = example.inputs(n)
    mask = mask if masked else torch.ones_like(mask)
    with torch.no_grad():
        want_s, want_z = model(s, z, mask)
        without = model(s, z, torch.ones_like(mask))
    got_s, got_z = example.run(mesh, model.state_dict(), s, z, mask)
    assert error(got_s, want_s) < BOUND
    assert (got_z is not None) == mesh.is_root
    if got_z is not None:
        assert error(got_z, want_z) < BOUND
        assert error(want_z, z) > 0.1 and error(want_s, s) > 0.1, "the stack does nothing"
        assert not masked or n == 1 or error(without[1], want_z) > 1e-3, "the mask does nothing"


def _without_boltz(mesh: Mesh, n: int) -> None:
    _equals_the_other_architecture(mesh, n, True)
    assert "boltz" not in sys.modules and "foldcp.boltz.families.swap" not in sys.modules


def _gradients(mesh: Mesh, n: int) -> None:
    """Of the inputs, and of the model's own parameters, which the stack on tiles shares."""
    example = _example()
    model = example.model()
    s, z, mask = example.inputs(n)
    ds, dz = (torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).double()
              for x in (s, z))  # fmt: skip
    whole = [s.clone().requires_grad_(), z.clone().requires_grad_()]
    out = model(*whole, mask)
    ((out[0] * ds).sum() + (out[1] * dz).sum()).backward()
    shared = model.blocks[0].tri_att_start.linear.weight
    want, shared.grad = shared.grad, None
    layout = mesh.layout(n)
    parts = [foldcp.cut_shard(s[None], layout), foldcp.cut_tile(z[None], layout)]
    parts = [x.requires_grad_() for x in parts]
    state = dict(model.state_dict(keep_vars=True))
    stack = example.tiled(state, mesh)
    assert any(x is shared for x in stack.parameters())
    out = stack(*parts, layout, pair_mask=foldcp.cut_tile(mask[None], layout))
    loss = (out[0] * foldcp.cut_shard(ds[None], layout)).sum()
    (loss + (out[1] * foldcp.cut_tile(dz[None], layout)).sum()).backward()
    got = foldcp.gather_pairs(parts[1].grad, layout, mesh)
    assert error(foldcp.gather_tokens(parts[0].grad, layout, mesh)[0], whole[0].grad) < BOUND
    if got is not None:
        assert error(got[0], whole[1].grad) < BOUND
    if mesh.size == 1:  # else each rank has its tile's part of it
        assert error(shared.grad, want) < BOUND


def _norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def _weights(seed: int) -> tuple[foldcp.PairWeights, foldcp.SingleWeights]:
    """Random weights with every bias that there may be, and a norm after the single track."""
    made = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return nn.Parameter(torch.randn(shape, generator=made, dtype=torch.float64) / 2)

    def transition(c: int) -> foldcp.TransitionWeights:
        return foldcp.TransitionWeights(
            normal(c), normal(c), normal(2 * c, c), normal(2 * c, c), normal(c, 2 * c)
        )

    hd, d = HEADS * WIDTH, 7
    multiplications = [
        foldcp.TriangleMultiplicationWeights(
            normal(C), normal(C), normal(2 * d, C), normal(2 * d, C),
            normal(d), normal(d), normal(C, d), normal(C, C),
        )
        for _ in range(2)
    ]  # fmt: skip
    attentions = [
        foldcp.TriangleAttentionWeights(
            normal(C), normal(C), normal(2, C), *(normal(8, C) for _ in "qkvg"), normal(C, 8), 2
        )
        for _ in range(2)
    ]
    single = foldcp.AttentionPairBiasWeights(
        normal(C_S), normal(C_S), normal(C), normal(C), normal(HEADS, C),
        *(normal(hd, C_S) for _ in "qkvg"), normal(C_S, hd), HEADS,
        *(normal(hd) for _ in "qkvg"), normal(C_S),
    )  # fmt: skip
    pair = foldcp.PairWeights(*multiplications, *attentions, transition(C))
    return pair, foldcp.SingleWeights(single, transition(C_S), normal(C_S), normal(C_S))


def _single_track(s: Tensor, z: Tensor, w: foldcp.SingleWeights, tokens: Tensor) -> Tensor:
    """Algorithm 17, lines 7 and 8, with all biases, in plain torch."""
    a, t = w.attention, w.transition
    x = _norm(s, a.norm_weight, a.norm_bias)
    q, k, v, g = (
        F.linear(x, weight, bias)
        for weight, bias in ((a.q, a.q_bias), (a.k, a.k_bias), (a.v, a.v_bias), (a.g, a.g_bias))
    )
    q, k, v = (y.unflatten(-1, (a.heads, -1)) for y in (q, k, v))
    logits = torch.einsum("bihd,bjhd->bhij", q, k) / WIDTH**0.5
    logits = logits + F.linear(_norm(z, a.pair_norm_weight, a.pair_norm_bias), a.pair).permute(
        0, 3, 1, 2
    )
    logits = logits.masked_fill(tokens[:, None, None] == 0, -torch.inf)
    o = torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), v).flatten(-2)
    s = s + F.linear(g.sigmoid() * o, a.o, a.o_bias)
    x = _norm(s, t.norm_weight, t.norm_bias)
    s = s + F.linear(F.silu(F.linear(x, t.fc1)) * F.linear(x, t.fc2), t.fc3)
    return _norm(s, w.post_norm_weight, w.post_norm_bias)


@torch.no_grad()
def _all_biases(mesh: Mesh) -> None:
    pair, single = _weights(1)
    made = torch.Generator().manual_seed(5)
    s, z = (
        torch.randn(shape, generator=made, dtype=torch.float64)
        for shape in ((2, N, C_S), (2, N, N, C))
    )
    tokens = torch.ones(2, N, dtype=torch.float64)
    tokens[1, 7:] = 0
    layout = mesh.layout(N)

    def both(w: foldcp.PairformerBlockWeights) -> tuple[Tensor, Tensor]:
        stack = foldcp.TiledPairformer([w], mesh)
        tile, shard = foldcp.cut_tile(z, layout), foldcp.cut_shard(s, layout)
        return stack(shard, tile, layout, token_mask=tokens)

    shard, tile = both(foldcp.PairformerBlockWeights(pair, single))
    alone, same = both(foldcp.PairformerBlockWeights(pair))
    assert torch.equal(tile, same) and torch.equal(alone, foldcp.cut_shard(s, layout))
    updated = foldcp.gather_pairs(tile, layout, mesh)
    got = foldcp.gather_tokens(shard, layout, mesh)
    if updated is not None:
        want = _single_track(s, updated, single, tokens)
        assert error(got[0], want[0]) < BOUND and error(got[1, :7], want[1, :7]) < BOUND


@pytest.mark.parametrize("mesh", [(1, 1), (1, 2), (2, 2), (2, 3)])
def test_another_architecture(mesh: tuple[int, int]) -> None:
    for n in (19, 1):
        run(*mesh, _equals_the_other_architecture, n, True)
    run(*mesh, _equals_the_other_architecture, 12, False)


def _runs(mesh: Mesh, state: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> tuple:
    return _example().run(mesh, state, *inputs)


class _Torch:
    """Stands in for torch in a module that rounds to float32 on purpose."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.mark.skipif(
    util.find_spec("protenix") is None,
    reason="Protenix is not installed (pip install --no-deps protenix optree)",
)
def test_the_miniature_is_protenix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its package gives the keys and, to 1e-12, the numbers; and foldcp runs on its weights."""
    monkeypatch.setenv("LAYERNORM_TYPE", "openfold")  # else it compiles a CUDA extension
    from protenix.model.modules import pairformer, primitives

    monkeypatch.setattr(primitives, "torch", _Torch())
    example = _example()
    sizes = dict(example.SIZES, hidden=128, width=32, pair_heads=4)  # the package's own
    given = {name: sizes[name] for name in ("c_s", "c_z")}
    theirs = pairformer.PairformerStack(
        n_blocks=sizes["blocks"], n_heads=sizes["heads"],
        num_intermediate_factor=sizes["factor"], **given,
    ).double().eval()  # fmt: skip
    torch.manual_seed(1)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = example.PairformerStack(**sizes).double().eval()
    ours.load_state_dict(theirs.state_dict())
    inputs = example.inputs(19)
    with torch.no_grad():
        want = theirs(*inputs)
        assert all(error(a, b) < 1e-12 for a, b in zip(ours(*inputs), want, strict=True))
    for s, z in run(2, 2, _runs, theirs.state_dict(), inputs):
        assert error(s, want[0]) < BOUND
        assert z is None or error(z, want[1]) < BOUND


def test_another_architecture_without_boltz() -> None:
    run(1, 2, _without_boltz, 9, bare=True)


@pytest.mark.parametrize("mesh", [(1, 1), (2, 2)])
def test_gradients_and_biases(mesh: tuple[int, int]) -> None:
    run(*mesh, _gradients, 13)
    run(*mesh, _all_biases)


@torch.no_grad()
def test_a_graph_of_one_block_serves_the_others() -> None:
    mesh = Mesh.create(1, 1)
    stack = foldcp.TiledPairformer(
        [foldcp.PairformerBlockWeights(*_weights(seed)) for seed in (1, 2)], mesh
    )
    one, two = stack.layers
    assert signature(one) == signature(two) is not None
    layout = mesh.layout(N)
    made = torch.Generator().manual_seed(5)
    state = torch.randn(1, N, C_S, generator=made).double()
    state = state, torch.randn(1, N, N, C, generator=made).double()

    def ran(block: Any) -> tuple[Tensor, Tensor]:
        return block.compute(*(x.clone() for x in state), *stack_masks(layout, mesh), layout)

    slots = WeightSlots(one)
    slots.load(two)
    with slots.standing_in():
        found = ran(one)
    assert all(torch.equal(a, b) for a, b in zip(found, ran(two), strict=True))
    assert not torch.equal(found[1], ran(one)[1])


_ODD = {
    "no heads": (dict(heads=0), {}, r"`w.attention.pair` is \[3, 6\]; expected \[0, 6\]"),
    "heads": (dict(heads=5), {}, r"`w.attention.pair` is \[3, 6\]; expected \[5, 6\]"),
    "a bias of one": (dict(q_bias=torch.ones(1).double()), {},
                      r"`w.attention.q_bias` is \[1\]; expected \[15\]"),
    "output": (dict(o=torch.ones(C_S, 14).double()), {},
               r"`w.attention.o` is \[8, 14\]; expected \[8, 15\]"),
    "dtype": (dict(q=torch.ones(15, C_S)), {},
              "`w.attention.q` has dtype torch.float32; expected float64"),
    "a shift alone": ({}, dict(post_norm_weight=None),
                      "`w.post_norm_weight` is None; expected a tensor because"),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", _ODD)
def test_weights_of_the_single_that_do_not_fit_are_named(name: str) -> None:
    attention, single, message = _ODD[name]
    mesh = Mesh.create(1, 1)
    pair, w = _weights(1)
    w = replace(w, attention=replace(w.attention, **attention), **single)
    stack = foldcp.TiledPairformer([foldcp.PairformerBlockWeights(pair, w)], mesh)
    s, z = torch.ones(1, N, C_S).double(), torch.ones(1, N, N, C).double()
    with pytest.raises(ValueError, match=f"single_track: {message}"):
        stack(s, z, mesh.layout(N))


def test_a_tensor_of_other_tokens_is_refused() -> None:
    layout = Mesh.create(1, 1).layout(9)
    with pytest.raises(ValueError, match=r"`z` is \[1, 8, 9, 4\]; expected \[B, 9, 9, ...\]"):
        foldcp.cut_tile(torch.zeros(1, 8, 9, 4), layout)
    with pytest.raises(ValueError, match=r"`s` is \[8, 4\]; expected \[B, 9, ...\]"):
        foldcp.cut_shard(torch.zeros(8, 4), layout)
