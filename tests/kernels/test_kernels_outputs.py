"""Outer product mean, expectation heads, relative positions, conditioned LayerNorm: all three ways.

Ground truth is the float64 reference; the kernels run in Triton's interpreter where there is no
GPU. A kernel may be twice as wrong as torch in the same dtype, plus a floor; gradients three times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, FLOOR
from torch import Tensor

from foldcp_kernels.adaptive_norm import adaptive_norm, gated_residual
from foldcp_kernels.binned_heads import expected_values
from foldcp_kernels.core import chunking
from foldcp_kernels.core import definitions as reference
from foldcp_kernels.outer_product_mean import _slower_reason, outer_product_mean
from foldcp_kernels.relative_position import add_relative_position, relative_position
from foldcp_kernels.relative_position.definition import Positions, Tokens
from foldcp_kernels.relative_position.positions import table_index

Op = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _chunks() -> Iterator[None]:
    """Torch works in several chunks even on these sizes."""
    chunking.set_chunk_bytes(40_000)
    yield
    chunking.set_chunk_bytes(None)


def _rand(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(DEVICE)


def _close(got: Tensor, want: Tensor, plain: Tensor, dtype: torch.dtype, factor: float) -> None:
    assert got.shape == want.shape and torch.isfinite(got).all()
    largest = want.abs().max().clamp(min=1e-30)
    error, allowed = ((x.double() - want).abs().max() / largest for x in (got, plain))
    assert error <= factor * allowed + FLOOR[dtype], f"{error:.2e}, torch {allowed:.2e}"


def _compare(op: Op, definition: Op, inputs: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Forward without gradients, then forward and gradients of all inputs."""
    exact = [x.to(dtype).double() for x in inputs]  # the definition sees the rounded inputs
    with torch.no_grad():
        want = definition(*exact)
        got, plain = (
            op(*(x.to(dtype).clone() for x in inputs), impl=i) for i in ("triton", "torch")
        )
    _close(got, want, plain, dtype, 2)
    dout = _rand(99, *want.shape)

    def gradients(f: Op, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in leaves]
        out = f(*leaves)
        return torch.autograd.grad(out, leaves, dout.to(out.dtype))

    right = gradients(definition, exact)
    low = [x.to(dtype) for x in inputs]
    mine, plain = (gradients(lambda *t, i=i: op(*t, impl=i), low) for i in ("triton", "torch"))
    for a, b, c in zip(mine, right, plain, strict=True):
        _close(a, b, c, dtype, 3)


# [B, R, T, S, D, C]
OUTER = [
    (2, 17, 5, 70, 32, 128), (1, 1, 1, 1, 32, 128), (1, 33, 9, 3, 12, 40), (1, 5, 3, 4, 64, 200),
]  # fmt: skip


def _outer(b: int, r: int, t: int, s: int, d: int, c: int) -> tuple[list[Tensor], Tensor]:
    z, left, right = _rand(0, b, r, t, c), _rand(1, b, s, r, d), _rand(2, b, s, t, d)
    keep = _rand(3, 2, b, s, max(r, t)) > -0.5
    keep[:, :, :, 0] = False  # a token without sequences
    rows, cols = keep[0, :, :, :r].double(), keep[1, :, :, :t].double()
    count = rows.transpose(1, 2) @ cols
    weight, bias = _rand(4, c, d * d, scale=1 / d), _rand(5, c)
    return [z, left * rows[..., None], right * cols[..., None], weight, bias], count


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", OUTER)
def test_outer_product_mean(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs, count = _outer(*shape)

    def op(z: Tensor, a: Tensor, b: Tensor, w: Tensor, bias: Tensor, impl: str) -> Tensor:
        return outer_product_mean(z, a, b, count.float(), w, bias, impl)

    def definition(z: Tensor, a: Tensor, b: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return reference.outer_product_mean_tile(z, a, b, count, w, bias)

    _compare(op, definition, inputs, dtype)


@torch.no_grad()
def test_outer_product_mean_in_place_without_sequences_and_beyond_float16() -> None:
    (z, a, b, w, bias), count = _outer(1, 17, 5, 70, 32, 128)
    z, a, b, w, bias = (x.float() for x in (z, a, b, w, bias))
    tile = z.transpose(1, 2).contiguous().transpose(1, 2)  # not contiguous
    run = outer_product_mean
    none = torch.zeros_like(count).float()
    assert run(tile, a * 0, b * 0, none, w, bias, impl="triton") is tile
    torch.testing.assert_close(tile, z + bias, rtol=0, atol=1e-6)
    half = [x.half() for x in (torch.zeros_like(z), a * 0 + 40, b * 0 + 40, w, bias)]
    want = reference.outer_product_mean_tile(*(x.double() for x in half[:3]), none.double() + 70,
                                             *(x.double() for x in half[3:]))  # fmt: skip
    got = run(*half[:3], none + 70, *half[3:], impl="triton")  # sums of 112,000
    assert (got.double() - want).abs().max() < 3e-3 * want.abs().max()


def test_few_and_very_many_sequences_are_left_to_torch() -> None:
    fits = [s for s in range(1, 2000) if _slower_reason(s, 32, 128, 2) is None]
    assert fits == list(range(43, 150))


# [B, R, T, C, bins, K], bias, symmetric, separate heads
HEADS = [
    ((2, 3, 17, 128, 64, 2), True, False, True),
    ((1, 20, 20, 64, 50, 1), True, True, False),
    ((1, 63, 63, 40, 128, 4), False, True, True),
    ((1, 1, 1, 128, 1, 1), False, False, False),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "biased", "symmetric", "separate"), HEADS)
def test_expected_values(
    shape: tuple[int, ...], biased: bool, symmetric: bool, separate: bool, dtype: torch.dtype
) -> None:
    b, r, t, c, bins, k = shape
    values = _rand(0, k, bins).float()
    same = _rand(1, b, t, r).transpose(1, 2) > 0 if separate else None
    rows = min(r, 5)
    names = ["weight"] + ["bias"] * biased + ["weight_other"] * separate
    sizes = {"weight": (bins, c), "bias": (bins,), "weight_other": (bins, c)}
    scale = {"weight": c**-0.5, "bias": 1.0, "weight_other": c**-0.5}
    inputs = [_rand(i, *sizes[n], scale=scale[n]) for i, n in enumerate(names, 2)]

    def arguments(z: Tensor, rest: tuple[Tensor, ...]) -> dict[str, Tensor | None]:
        other = z[:, :, :rows].transpose(1, 2) if symmetric else None
        cut = None if same is None else same[:, :rows]
        return {
            "x": z[:, :rows],
            "other": other,
            "same": cut,
            **dict(zip(names, rest, strict=True)),
        }

    def op(z: Tensor, *rest: Tensor, impl: str) -> Tensor:
        return expected_values(values=values, impl=impl, **arguments(z, rest))

    def definition(z: Tensor, *rest: Tensor) -> Tensor:
        return reference.expected_values(values=values.double(), **arguments(z, rest))

    _compare(op, definition, [_rand(9, b, r, t, c), *inputs], dtype)


@torch.no_grad()
@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_expected_values_survive_extreme_logits(impl: str) -> None:
    x, weight = _rand(0, 3, 5, 64).float(), _rand(1, 64, 64, scale=1e4).float()
    values = torch.arange(64.0, device=DEVICE)[None]
    want = reference.expected_values(x.double(), weight.double(), values.double())
    got = expected_values(x, weight, values, impl=impl)
    assert got.shape == (1, 3, 5) and got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)
    same = torch.zeros(3, 5, dtype=torch.bool, device=DEVICE)
    zero = torch.zeros_like(weight)
    got = expected_values(x, weight, values, weight_other=zero, same=same, impl=impl)
    torch.testing.assert_close(got, torch.full_like(got, 31.5))


def _positions(r: int, t: int, r_max: int, s_max: int, fix: bool, cyclic: bool) -> Positions:
    g = torch.Generator().manual_seed(r * 1000 + t)

    def draw(low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high, size, generator=g).int().to(DEVICE)

    classes = draw(0, 3, 7, 3) * draw(1, 3, 7, 3)
    # Even periods give halves; the largest one is what chains without a period are divided by.
    periods = torch.tensor([4.0, 6.0, 10.0, 7.0, 10000.0], device=DEVICE)

    def side(n: int) -> Tokens:
        residue = draw(-r_max - 2, r_max + 2, n)
        residue[n // 2 :] += 123_456 * (draw(0, 9, n - n // 2) == 0)
        period = periods[draw(0, 5, n).long()] if cyclic else None
        return Tokens(draw(0, 7, n), residue, draw(0, 2 * r_max, n), period)

    return Positions(side(r), side(t), classes, r_max, s_max, fix)


@torch.no_grad()
@pytest.mark.parametrize("r,t", [(1, 1), (17, 63), (5, 100)])
@pytest.mark.parametrize("limits", [(32, 2), (3, 1)])
@pytest.mark.parametrize(("fix", "cyclic"), [(True, True), (False, True), (True, False)])
def test_relative_position_index(
    r: int, t: int, limits: tuple[int, int], fix: bool, cyclic: bool
) -> None:
    p = _positions(r, t, *limits, fix, cyclic)
    numbers = torch.arange(float(p.table_rows), device=DEVICE)[:, None]
    want = table_index(p)
    assert t == 1 or want.unique().numel() > 25
    assert want.min() >= 0 and want.max() < p.table_rows
    for impl in ("triton", "torch", "reference"):
        assert torch.equal(relative_position(numbers, p, impl)[..., 0], want.float()), impl


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [128, 40])
def test_relative_position_is_added_in_place(dtype: torch.dtype, channels: int) -> None:
    p = _positions(17, 63, 3, 1, True, True)
    table = _rand(0, p.table_rows, channels).float()
    out = _rand(1, 2, 63, 17, channels).to(dtype).transpose(1, 2)
    want = (out.float() + table[table_index(p).long()]).to(dtype)
    for impl in ("triton", "torch", "reference"):
        x = out.clone(memory_format=torch.preserve_format)
        assert not x.is_contiguous()
        assert add_relative_position(x, table, p, impl) is x
        torch.testing.assert_close(
            x, want, rtol=0, atol=0 if impl == "triton" else FLOOR[dtype] * 9
        )
    part = add_relative_position(out[0, 5:9].clone(), table, p.cut(5, 9), "triton")
    assert torch.equal(part, want[0, 5:9])


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_relative_position_gradients(impl: str) -> None:
    p = _positions(17, 63, 3, 1, True, True)
    table, x = _rand(0, p.table_rows, 24), _rand(1, 2, 17, 63, 24)
    dout = _rand(2, 2, 17, 63, 24)
    low = [table.float().requires_grad_(), x.float().requires_grad_()]
    got = torch.autograd.grad(add_relative_position(low[1], low[0], p, impl), low, dout.float())
    want = torch.zeros_like(table)
    for each in dout:
        want.index_add_(0, table_index(p).flatten(), each.flatten(0, 1))
    torch.testing.assert_close(got[0].double(), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(got[1], dout.float())
    (alone,) = torch.autograd.grad(relative_position(low[0], p, impl), low[0], dout[0].float())
    want = torch.zeros_like(table).index_add_(0, table_index(p).flatten(), dout[0].flatten(0, 1))
    torch.testing.assert_close(alone.double(), want, rtol=1e-5, atol=1e-5)


# [M, n, C], samples of the conditioning, logits
NORMS = [
    ((3, 17, 128), 1, True), ((2, 5, 200), 2, False),
    ((1, 3, 768), 1, True), ((2, 1, 1024), 1, False),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "shared", "logits"), NORMS)
def test_adaptive_norm_and_gated_residual(
    shape: tuple[int, ...], shared: int, logits: bool, dtype: torch.dtype
) -> None:
    of = (shared, *shape[1:])
    a, scale, shift, x = _rand(0, *shape, scale=3), _rand(1, *of), _rand(2, *of), _rand(3, *shape)
    a[0, 0] = 5.0  # a constant row
    scale[0, 0, :4] = torch.tensor([-80.0, 80.0, 20.0, -20.0])
    f = torch.sigmoid if logits else lambda t: t

    def norm(a: Tensor, scale: Tensor, shift: Tensor, impl: str) -> Tensor:
        return adaptive_norm(a, scale, shift, logits, impl)

    def residual(a: Tensor, gate: Tensor, x: Tensor, impl: str) -> Tensor:
        return gated_residual(a, gate, x, logits, impl)

    # A constant row has gradients of 1 / sqrt(eps), beyond what float16 resolves beside the rest.
    b = a.clone()
    b[0, 0] = a[-1, -1]
    with torch.no_grad():
        low = [t.to(dtype) for t in (a, scale, shift)]
        want = reference.adaptive_norm(low[0].double(), f(low[1].double()), low[2].double())
        got, plain = (norm(*low, impl=i) for i in ("triton", "torch"))
        _close(got, want, plain, dtype, 2)
        strided = low[0].transpose(0, 1).contiguous().transpose(0, 1)
        assert torch.equal(norm(strided, *low[1:], impl="triton"), got)
    _compare(norm, lambda a, s, t: reference.adaptive_norm(a, f(s), t), [b, scale, shift], dtype)
    _compare(residual, lambda a, g, x: reference.gated_residual(a, f(g), x), [a, scale, x], dtype)


@torch.no_grad()
@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_adaptive_norm_of_extreme_rows(impl: str) -> None:
    a = torch.ones(1, 3, 200, device=DEVICE)
    a[0, 1], a[0, 2, 7] = 1e4 / 3, 1e15
    shift = _rand(0, 1, 3, 200).float()
    got = adaptive_norm(a, torch.ones_like(shift), shift, impl=impl)
    torch.testing.assert_close(got[0, :2], shift[0, :2], rtol=0, atol=1e-4)
    want = reference.adaptive_norm(a.double(), 1.0, shift.double())
    torch.testing.assert_close(got[0, 2].double(), want[0, 2], rtol=1e-5, atol=1e-5)
