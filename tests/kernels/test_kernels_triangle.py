"""The fused kernels of the pair stack and attention against their definitions, gradients too.

They run in Triton's interpreter on a CPU and as compiled kernels where there is a GPU (bfloat16
too). Tolerances: see kernel_checks.
"""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, check, compare, error
from torch import Tensor

from foldcp_kernels.attention import attend, attend_panel
from foldcp_kernels.core import definitions as reference
from foldcp_kernels.gated_output import fused as gated_output
from foldcp_kernels.norm_linear import norm_linear_planes
from foldcp_kernels.norm_linear.planes import padded_planes
from foldcp_kernels.pair_weighted_averaging import (
    PairWeightedAveragingWeights,
    pair_weighted_averaging,
)
from foldcp_kernels.transition import TransitionWeights, transition
from foldcp_kernels.triangle_attention import TriangleAttentionWeights, triangle_attention
from foldcp_kernels.triangle_multiplication import (
    TriangleMultiplicationWeights,
    triangle_multiplication,
)

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def rand(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(DEVICE)


def parameters(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Gains near 1, matrices that keep the size of what they multiply."""
    return [
        rand(seed + i, *s, scale=s[-1] ** -0.5) if len(s) == 2 else 1 + rand(seed + i, *s) / 4
        for i, s in enumerate(shapes)
    ]


def pair_mask(seed: int, b: int, n: int, dead: bool) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    mask = (torch.rand(b, n, n, generator=g) > 0.3).double()
    mask[:, range(n), range(n)] = 1
    if dead:
        mask[0, n // 2] = 0  # a line without any key, for either node
        mask[-1, :, n // 3] = 0
    return mask.to(DEVICE)


@by_dtype
@pytest.mark.parametrize("outgoing", [True, False])
@pytest.mark.parametrize("n,c,d", [(1, 32, 32), (17, 128, 128), (35, 24, 40)])
def test_triangle_multiplication(n: int, c: int, d: int, outgoing: bool, dtype) -> None:
    weights = parameters(3, (c,), (c,), (2 * d, c), (2 * d, c), (d,), (d,), (c, d), (c, c))
    mask = pair_mask(n, 2, n, False)

    def op(z: Tensor, *w: Tensor, impl: str) -> Tensor:
        keep = mask.to(z.dtype)
        weights = TriangleMultiplicationWeights(*w)
        return triangle_multiplication(z, keep, weights, outgoing, impl)

    check(f"N={n}", op, [rand(n, 2, n, n, c), *weights], dtype, grads=n != 35)


@by_dtype
@pytest.mark.parametrize(
    "n,c,heads,d,masked,starting",
    [
        (1, 32, 2, 16, "none", True),
        (17, 48, 2, 24, "none", True),
        (17, 48, 2, 24, "some", False),
        (35, 64, 1, 64, "none", False),
        (35, 32, 2, 32, "some", True),
        (35, 32, 2, 32, "dead", True),
        (35, 32, 2, 32, "dead", False),
    ],
)
def test_triangle_attention(n, c, heads, d, masked, starting, dtype) -> None:
    hd = heads * d
    weights = parameters(5, (c,), (c,), (heads, c), (hd, c), (hd, c), (hd, c), (hd, c), (c, hd))
    mask = None if masked == "none" else pair_mask(n, 2, n, masked == "dead")

    def op(z: Tensor, *w: Tensor, impl: str) -> Tensor:
        keep = None if mask is None else mask.to(z.dtype)
        weights = TriangleAttentionWeights(*w, heads)
        return triangle_attention(z, keep, weights, starting, impl)

    check(f"N={n}", op, [rand(n, 2, n, n, c), *weights], dtype, grads=masked != "dead" and n < 35)


ATTENTION = [  # G0, G1, H, I, K, D, bias batches
    (1, 3, 2, 17, 17, 32, 1),
    (2, 5, 1, 63, 100, 24, 2),
    (2, 1, 2, 70, 33, 48, 1),
    (1, 2, 2, 1, 1, 64, 1),
    (3, 2, 2, 32, 128, 32, 3),
    (2, 2, 1, 32, 128, 16, 2),
]


@by_dtype
@pytest.mark.parametrize("case", ATTENTION, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_attention(case: tuple[int, ...], masked: bool, dtype) -> None:
    g0, g1, h, i, k, d, b0 = case
    keep = None
    if masked:
        keep = torch.rand(g0, g1, k, generator=torch.Generator().manual_seed(1)) > 0.5
        keep[0, 0, : k - 1] = False  # a row whose only key is the last: dead blocks before it
        keep[0, 0, -1] = True
        keep[-1, -1] = False  # a row that keeps none attends to all
        keep = keep.to(DEVICE)
    inputs = [rand(i + x, g0, g1, n, h, d).transpose(2, 3) for x, n in enumerate((i, k, k))]

    def op(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, impl: str) -> tuple[Tensor, Tensor]:
        kept = keep
        if impl == "reference" and keep is not None:
            kept = keep | ~keep.any(-1, keepdim=True)
        return attend(q, k, v, bias, d**-0.5, kept, impl)

    check(str(case), op, [*inputs, rand(i + k, b0, 1, h, i, k, scale=3.0)], dtype)


@by_dtype
def test_four_dimensions_are_rows_of_one_bias_or_of_many(dtype) -> None:
    q, k, v = (rand(s, 3, 2, 20, 24) for s in range(3))
    for batches in (1, 3):
        bias = rand(9, batches, 2, 20, 20)
        check("4", lambda *t, impl: attend(*t, 0.2, impl=impl), [q, k, v, bias], dtype)
    check("no bias", lambda *t, impl: attend(*t, None, 0.2, impl=impl), [q, k, v], dtype)


@by_dtype
def test_panels_carry_on(dtype) -> None:
    """Three panels, the middle one with far larger logits, equal one pass over all keys."""
    q, k, v = (rand(s, 2, 3, 2, 40, 32).to(dtype) for s in range(3))
    bias = (rand(4, 2, 1, 2, 40, 40) + 60 * (torch.arange(40, device=DEVICE) // 16 == 1)).to(dtype)
    want, want_lse = reference.attention(*(x.double() for x in (q, k, v, bias)), 0.3, None)
    found = {}
    for impl in ("triton", "torch"):
        carry = None
        for lo, hi in ((0, 16), (16, 32), (32, 40)):
            part = (k[..., lo:hi, :], v[..., lo:hi, :], bias[..., lo:hi])
            carry = attend_panel(q, *part, 0.3, carry, hi == 40, impl)
        found[impl] = carry.finish()
    compare("panels", found["triton"], (want, want_lse), found["torch"], dtype)


@by_dtype
def test_extreme_logits(dtype) -> None:
    """Large magnitudes, one key that takes all, rising blocks that rescale every time, ties."""
    q, k, v = (rand(s, 1, 2, 2, 33, 32).to(dtype) for s in range(3))
    steps = torch.arange(96, device=DEVICE, dtype=torch.float64)
    k, v = (x.repeat(1, 1, 1, 3, 1)[..., :96, :].contiguous() for x in (k, v))
    for name, bias in {
        "rising": steps * 20,
        "falling": -steps * 20,
        "spike": 500.0 * (steps == 70),
        "ties": steps * 0,
        "huge": steps.sin() * 20000,
    }.items():
        tile = bias.expand(1, 1, 2, 33, 96).to(dtype)
        want = reference.attention(*(x.double() for x in (q, k, v, tile)), 1.0, None)
        got, same = (attend(q, k, v, tile, 1.0, impl=i) for i in ("triton", "torch"))
        compare(name, got, want, same, dtype)


@by_dtype
@pytest.mark.parametrize("shape,hidden", [((1, 2, 70, 128), 512), ((2, 3, 17, 40), 80)])
def test_transition(shape: tuple[int, ...], hidden: int, dtype) -> None:
    c = shape[-1]
    weights = parameters(7, (c,), (c,), (hidden, c), (hidden, c), (c, hidden))
    for strided in (False, True):
        x = rand(1, *shape)
        x = x.transpose(1, 2) if strided else x
        op = lambda x, *w, impl: transition(x, TransitionWeights(*w), impl=impl)  # noqa: E731
        check(f"{shape} strided={strided}", op, [x, *weights], dtype, grads=strided)


@by_dtype
def test_biases_of_many_layers_in_one_pass(dtype) -> None:
    c, outs, n = 128, 24 * 16, 19
    w = [rand(2, outs, c, scale=0.1), rand(3, outs)]
    x = rand(1, 2, n, n + 4, c)

    def planes(x: Tensor, w: Tensor, bias: Tensor, impl: str) -> Tensor:
        if impl == "reference":
            y = torch.nn.functional.layer_norm(x, (c,))
            return torch.nn.functional.linear(y, w, bias).permute(0, 3, 1, 2)
        return norm_linear_planes(x, None, None, w, bias, impl=impl)

    check("planes", planes, [x, *w], dtype)
    with torch.no_grad():
        x, w, b = x.to(dtype), w[0].to(dtype), w[1].to(dtype)
        want = norm_linear_planes(x, None, None, w, b, impl="triton")
        out = padded_planes(x.new_empty(2, 2 * n, n + 4, 1), outs, dtype)
        norm_linear_planes(x, None, None, w, b, out=out[:, :, n:], impl="triton")
        assert torch.equal(out[:, :, n:], want)
        # Columns of wider planes: their neighbours stay as they are.
        wide = x.new_full((2, 3, n, n + 40), 7)
        inside = wide[..., 9 : n + 13]
        norm_linear_planes(x, None, None, w[:3], b[:3], out=inside, impl="triton")
        assert torch.equal(inside, want[:, :3])
        inside.fill_(7)
        assert (wide == 7).all()


@pytest.mark.parametrize(("start", "bound"), [(0, 32), (12, 20)])
def test_planes_are_read_within_their_memory(start: int, bound: int) -> None:
    """Wide loads pass the last position only where memory goes on behind the last row."""
    x, w, seen = rand(1, 1, 2, 20, 32), rand(3, 32), []
    y = rand(2, 1, 3, 2, 32)[..., start : start + 20]
    with mock.patch.object(gated_output, "launch", lambda *args, **_: seen.append(args[14])):
        gated_output.multiplication_output_fwd(
            x, w, w, rand(4, 32, 32), y, w[:3], w[:3], rand(5, 32, 3)
        )
    assert seen == [(2, 20, bound)]


@by_dtype
def test_pair_weighted_averaging(dtype) -> None:
    n, cm, cz, h, d = 21, 64, 128, 8, 32
    hd = h * d
    weights = parameters(2, (cm,), (cm,), (cz,), (cz,), (hd, cm), (hd, cm), (h, cz), (cm, hd))

    def op(m: Tensor, z: Tensor, *w: Tensor, impl: str) -> Tensor:
        return pair_weighted_averaging(m, z, PairWeightedAveragingWeights(*w, h), impl)

    check("pwa", op, [rand(1, 2, 3, n, cm), rand(2, 2, n, n, cz), *weights], dtype)


@by_dtype
def test_extreme_values_of_the_row_kernels(dtype) -> None:
    """Constant rows (LayerNorm of nothing), saturated gates, large magnitudes."""
    n, c = 9, 32
    for name, z, gate in (
        ("constant rows", rand(1, 1, n, n, 1).expand(1, n, n, c).contiguous(), 1.0),
        ("saturated gates", rand(1, 1, n, n, c), 100.0),
        ("large", 1000 + 100 * rand(1, 1, n, n, c), 1.0),
        ("zero", torch.zeros_like(rand(1, 1, n, n, c)), 1.0),
    ):
        w = parameters(3, (c,), (c,), (2 * c, c), (2 * c, c), (c,), (c,), (c, c), (c, c))
        w[3], w[7] = w[3] * gate, w[7] * gate

        def multiply(z: Tensor, *w: Tensor, impl: str) -> Tensor:
            return triangle_multiplication(z, None, TriangleMultiplicationWeights(*w), True, impl)

        check(f"multiplication, {name}", multiply, [z, *w], dtype, grads=False)
        w = parameters(3, (c,), (c,), (4 * c, c), (4 * c, c), (c, 4 * c))
        op = lambda x, *w, impl: transition(x, TransitionWeights(*w), impl=impl)  # noqa: E731
        check(f"transition, {name}", op, [z, *w], dtype, grads=False)


def test_float32_pair_under_autocast() -> None:
    """What Boltz does: z and parameters in float32, products in half precision, in place."""
    n, c, half = 20, 128, torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
    z = rand(1, 1, n, n, c).float()
    mul = [x.float() for x in parameters(3, (c,), (c,), (2 * c, c), (2 * c, c), (c,), (c,), (c, c))]
    mul = TriangleMultiplicationWeights(*mul, rand(4, c, c, scale=0.1).float())
    att = parameters(5, (c,), (c,), (4, c), (c, c), (c, c), (c, c), (c, c), (c, c))
    att = TriangleAttentionWeights(*(x.float() for x in att), 4)
    swi = parameters(7, (c,), (c,), (4 * c, c), (4 * c, c), (c, 4 * c))
    swi = TransitionWeights(*(x.float() for x in swi))
    for name, op in {
        "out": lambda z, impl: triangle_multiplication(z, None, mul, True, impl),
        "in": lambda z, impl: triangle_multiplication(z, None, mul, False, impl),
        "start": lambda z, impl: triangle_attention(z, None, att, True, impl),
        "end": lambda z, impl: triangle_attention(z, None, att, False, impl),
        "transition": lambda z, impl: transition(z, swi, impl=impl),
    }.items():
        want = op(z.clone(), "torch").double()
        with torch.no_grad(), torch.autocast(DEVICE.type, half):
            got, same = z.clone(), z.clone()
            assert op(got, "triton").data_ptr() == got.data_ptr(), f"{name} is not in place"
            op(same, "torch")
        assert got.dtype == torch.float32
        compare(name, [got], [want], [same], half)
        assert error(got, want) > 1e-6, f"{name}: products did not run in half precision"


def test_weights_that_change_are_read_again() -> None:
    c = 32
    swi = [x.float() for x in parameters(7, (c,), (c,), (4 * c, c), (4 * c, c), (c, 4 * c))]
    x = rand(1, 1, 4, 4, c).float()
    for _ in range(2):
        w = TransitionWeights(*swi)
        want = transition(x.clone().double(), TransitionWeights(*(t.double() for t in swi)))
        with torch.no_grad():
            got = transition(x.clone(), w, impl="triton")
            assert error(got, want) < 1e-5
            swi[4].mul_(-2)


BAD = {
    "dtype": (lambda: attend(*[rand(1, 1, 1, 4, 8)] * 3, None, 1.0, impl="triton"), "float64"),
    "head dim": (
        lambda: attend(*[rand(1, 1, 1, 4, 80).float()] * 3, None, 1.0, impl="triton"),
        "`q` has head dim 80; expected at most 64",
    ),
    "no keys": (
        lambda: attend(rand(1, 1, 1, 4, 8), *[rand(1, 1, 1, 0, 8)] * 2, None, 1.0),
        "no keys",
    ),
    "impl": (lambda: attend(*[rand(1, 1, 1, 4, 8)] * 3, None, 1.0, impl="cuda"), "must be one of"),
    "peer": (
        lambda: attend(*[rand(1, 1, 1, 4, 8).float()] * 3, None, 1.0, impl="cuequivariance"),
        "cuequivariance does not have this op",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the guard is for the interpreter")
def test_interpreter_refuses_bfloat16() -> None:
    q = rand(1, 1, 1, 4, 16).bfloat16()
    with pytest.raises(ValueError, match="bfloat16 under TRITON_INTERPRET"):
        attend(q, q, q, None, 1.0, impl="triton")


def test_prescaled_queries_are_recognised() -> None:
    q, k, v = (rand(s, 1, 1, 5, 16).float() for s in range(3))
    plain = attend(q, k, v, None, 0.25, impl="triton")[0]
    scaled = attend(q * (0.25 * math.log2(math.e)), k, v, None, math.log(2), impl="triton")[0]
    assert error(scaled, plain) < 1e-6
