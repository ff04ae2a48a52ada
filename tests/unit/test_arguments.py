"""What every op does with shapes and dtypes that do not fit each other, and with no elements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from foldcp.fabric.mesh import Mesh
from foldcp.layout.tiles import PairLayout
from foldcp.rings.attention_pair_bias import attention_pair_bias
from foldcp.rings.outer_product_mean import outer_product_mean as tiled_outer_product_mean
from foldcp.rings.triangle_attention import triangle_attention as tiled_attention
from foldcp.rings.triangle_multiplication import triangle_multiplication as tiled_multiplication
from foldcp_kernels.adaptive_norm import adaptive_norm, gated_residual
from foldcp_kernels.attention import attend, attend_panel
from foldcp_kernels.binned_heads import expectations, expected_values
from foldcp_kernels.core import arguments
from foldcp_kernels.gated_output import gated_output
from foldcp_kernels.norm_linear import norm_linear_planes, norm_linear_rows
from foldcp_kernels.outer_product_mean import outer_product_mean
from foldcp_kernels.pair_weighted_averaging import (
    PairWeightedAveragingWeights,
    pair_weighted_averaging,
)
from foldcp_kernels.relative_position import add_relative_position, relative_position
from foldcp_kernels.relative_position.definition import Positions, Tokens
from foldcp_kernels.transition import TransitionWeights, swiglu, transition
from foldcp_kernels.triangle_attention import TriangleAttentionWeights, triangle_attention
from foldcp_kernels.triangle_multiplication import (
    TriangleMultiplicationWeights,
    triangle_multiplication,
)

Tensors = dict[str, Tensor]
# Sizes by letter, each even and, but for powers of the same, unlike the others.
B, S, N, C, D, H, Z, V = 4, 6, 8, 12, 16, 2, 20, 10
R_MAX, S_MAX = 3, 1
ROWS = 2 * (2 * S_MAX + 2) * (4 * R_MAX + 3)
MULTIPLICATION = dict(
    norm_in_weight=(C,), norm_in_bias=(C,), p_in=(2 * D, C), g_in=(2 * D, C),
    norm_out_weight=(D,), norm_out_bias=(D,), p_out=(C, D), g_out=(C, C),
)  # fmt: skip
ATTENTION = dict(
    norm_weight=(C,), norm_bias=(C,), bias=(H, C), q=(H * D, C), k=(H * D, C), v=(H * D, C),
    g=(H * D, C), o=(C, H * D),
)  # fmt: skip
AVERAGING = dict(
    norm_m_weight=(C,), norm_m_bias=(C,), norm_z_weight=(Z,), norm_z_bias=(Z,), m=(H * D, C),
    g=(H * D, C), z=(H, Z), o=(C, H * D),
)  # fmt: skip
TRANSITION = dict(norm_weight=(C,), norm_bias=(C,), fc1=(Z, C), fc2=(Z, C), fc3=(C, Z))
INTEGERS = ("chain", "residue", "token")


@dataclass(frozen=True)
class Case:
    """One op: its tensors by name, a call, and the dimensions that may have any size."""

    shapes: dict[str, tuple[int, ...]]
    call: Callable[[Tensors, str], object]
    free: tuple[tuple[str, int], ...] = ()


def _weights(kind: type, t: Tensors, *more: int) -> object:
    return kind(*(x for name, x in t.items() if name.startswith("w.")), *more)


def _w(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"w.{name}": shape for name, shape in shapes.items()}


def _positions(t: Tensors) -> Positions:
    rows, cols = (
        Tokens(*(t[f"positions.{side}.{x}"] for x in INTEGERS), t.get(f"positions.{side}.period"))
        for side in ("rows", "cols")
    )
    return Positions(rows, cols, t["positions.classes"], R_MAX, S_MAX, True)


def _averaging(t: Tensors, impl: str) -> Tensor:
    w = _weights(PairWeightedAveragingWeights, t, H)
    return pair_weighted_averaging(t["m"], t["z"], w, impl, t["mask"])


PAIRS = dict(z=(B, N, N, C), mask=(B, N, N))
POSITIONS = {f"positions.{s}.{x}": (n,) for s, n in (("rows", N), ("cols", S)) for x in INTEGERS}
PAIR_BIAS = dict(q=(B, N, H, D), k=(B, N, H, D), v=(B, N, H, D), bias=(B, H, N, N))
POSITIONS |= {"positions.cols.period": (S,), "positions.classes": (V, 3)}
VALUES = dict(weight=(V, C), values=(H, V), bias=(V,), weight_other=(V, C))
QKV = dict(q=(N, D), k=(S, D), v=(S, D), bias=(N, S))


def _attend(lead: tuple[int, ...], shared: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    found = {x: (*(shared if x == "bias" else lead), *shape) for x, shape in QKV.items()}
    return found | dict(keep=(*lead[:-1], S))


def _tiled(op: Callable[..., Tensor], t: Tensors, kind: type, *more: int) -> Tensor:
    return op(t["z"], t["mask"], _weights(kind, t, *more), True, LAYOUT, ALONE)


LAYOUT, ALONE = PairLayout(N, 1, 1, 0), Mesh.create(1, 1, "cpu")
CASES = {
    "triangle multiplication": Case(
        PAIRS | _w(MULTIPLICATION),
        lambda t, i: triangle_multiplication(
            t["z"], t["mask"], _weights(TriangleMultiplicationWeights, t), True, i
        ),
    ),
    "triangle attention": Case(
        PAIRS | _w(ATTENTION),
        lambda t, i: triangle_attention(
            t["z"], t["mask"], _weights(TriangleAttentionWeights, t, H), False, i
        ),
    ),
    "pair weighted averaging": Case(
        dict(m=(B, S, N, C), z=(B, N, N, Z), mask=(B, N, N)) | _w(AVERAGING),
        _averaging,
        free=(("m", 1),),
    ),
    "transition": Case(
        dict(x=(B, N, S, C)) | _w(TRANSITION),
        lambda t, i: transition(t["x"], _weights(TransitionWeights, t), impl=i),
        free=(("x", 0), ("x", 1), ("x", 2)),
    ),
    "transition of a single track": Case(
        dict(x=(B, N, C)) | _w(TRANSITION),
        lambda t, i: transition(t["x"], _weights(TransitionWeights, t), impl=i),
        free=(("x", 0), ("x", 1)),
    ),
    "swiglu": Case(
        dict(x=(B, N, C)) | _w(TRANSITION | dict(fc3=(V, Z))),
        lambda t, i: swiglu(t["x"], _weights(TransitionWeights, t)),
        free=(("x", 0), ("x", 1), ("w.fc3", 0)),
    ),
    "outer product mean": Case(
        dict(
            z=(B, N, S, C), a=(B, V, N, D), b=(B, V, S, D), count=(B, N, S), weight=(C, D * D),
            bias=(C,),
        ),
        lambda t, i: outer_product_mean(**t, impl=i),
    ),
    "attention": Case(
        _attend((B, Z, H), (B, 1, H)),
        lambda t, i: attend(t["q"], t["k"], t["v"], t["bias"], 0.3, t["keep"], i),
    ),
    "attention of rows": Case(
        _attend((B, H), (B, H)),
        lambda t, i: attend(t["q"], t["k"], t["v"], t["bias"], 0.3, t["keep"], i),
    ),
    "attention of a panel": Case(
        {x: s for x, s in _attend((B, Z, H), (B, 1, H)).items() if x != "keep"},
        lambda t, i: attend_panel(*t.values(), 0.3, None, True, i),
    ),
    "rows": Case(
        dict(x=(B, N, S, C), gain=(C,), shift=(C,), weight=(V, C)),
        lambda t, i: norm_linear_rows(**t, impl=i),
        free=(("x", 0), ("x", 1), ("x", 2), ("weight", 0)),
    ),
    "planes": Case(
        dict(x=(B, N, S, C), gain=(C,), shift=(C,), weight=(V, C), bias=(V,), out=(B, V, N, S)),
        lambda t, i: norm_linear_planes(**t, impl=i),
    ),
    "gated output": Case(
        dict(x=(B, N, S, C), gain=(C,), shift=(C,), gate=(V, C), o=(B, N, S, V), weight=(C, V)),
        lambda t, i: gated_output(**t, impl=i),
    ),
    "expected values": Case(
        dict(x=(B, N, S, C), other=(B, N, S, C), same=(B, N, S)) | VALUES,
        lambda t, i: expected_values(**t, impl=i),
        free=(("values", 0),),
    ),
    "expected values of rows": Case(
        dict(x=(N, S, C), other=(N, S, C), same=(N, S)) | VALUES,
        lambda t, i: expected_values(**t, impl=i),
        free=(("values", 0),),
    ),
    "expectations": Case(
        dict(logits=(N, S, V), values=(H, V)),
        lambda t, i: expectations(**t),
        free=(("logits", 0), ("logits", 1), ("values", 0)),
    ),
    "adaptive norm": Case(
        dict(a=(B, N, C), scale=(B, N, C), shift=(B, N, C)),
        lambda t, i: adaptive_norm(**t, impl=i),
    ),
    "gated residual": Case(
        dict(a=(B, N, C), gate=(B, N, C), x=(B, N, C)),
        lambda t, i: gated_residual(**t, impl=i),
    ),
    "tiled multiplication": Case(
        PAIRS | _w(MULTIPLICATION),
        lambda t, i: _tiled(tiled_multiplication, t, TriangleMultiplicationWeights),
    ),
    "tiled attention": Case(
        PAIRS | _w(ATTENTION),
        lambda t, i: _tiled(tiled_attention, t, TriangleAttentionWeights, H),
    ),
    "tiled outer product mean": Case(
        dict(
            z=(B, N, N, C), a=(B, V, N, D), b=(B, V, N, D), mask=(B, V, N), weight=(C, D * D),
            bias=(C,),
        ),
        lambda t, i: tiled_outer_product_mean(*t.values(), LAYOUT, ALONE),
    ),
    "attention with pair bias": Case(
        PAIR_BIAS, lambda t, i: attention_pair_bias(*t.values(), 0.3, LAYOUT, ALONE)
    ),
    "relative position": Case(
        dict(table=(ROWS, C)) | POSITIONS,
        lambda t, i: relative_position(t["table"], _positions(t), i),
        free=(("table", 1), ("positions.classes", 0)),
    ),
    "added relative position": Case(
        dict(table=(ROWS, C), out=(N, S, C)) | POSITIONS,
        lambda t, i: add_relative_position(t["out"], t["table"], _positions(t), i),
        free=(("positions.classes", 0),),
    ),
    "added relative position of a batch": Case(
        dict(table=(ROWS, C), out=(B, N, S, C)) | POSITIONS,
        lambda t, i: add_relative_position(t["out"], t["table"], _positions(t), i),
        free=(("out", 0), ("positions.classes", 0)),
    ),
}  # fmt: skip
IN_PLACE = {
    "triangle multiplication": "z", "triangle attention": "z", "pair weighted averaging": "m",
    "transition": "x", "transition of a single track": "x", "outer product mean": "z",
    "planes": "out", "gated output": "x", "tiled multiplication": "z", "tiled attention": "z",
    "tiled outer product mean": "z", "added relative position": "out",
    "added relative position of a batch": "out",
}  # fmt: skip
both = pytest.mark.parametrize("impl", ["torch", "triton"])


def _tensors(case: Case, double: bool = False) -> Tensors:
    g, found = torch.Generator().manual_seed(0), {}
    for name, shape in case.shapes.items():
        if name.split(".")[0] == "positions" and "period" not in name:
            found[name] = torch.randint(0, V, shape, generator=g, dtype=torch.int32)
        elif name in ("keep", "same"):
            found[name] = torch.rand(shape, generator=g) > 0.5
        else:
            x = torch.randn(shape, generator=g, dtype=torch.float64)
            found[name] = x.abs() + 1 if name in ("count", "positions.cols.period") else x
            found[name] = found[name] if double else found[name].float()
    return found


def _halved(x: Tensor, dim: int) -> Tensor:
    return x.narrow(dim, 0, x.shape[dim] // 2).clone()


@torch.no_grad()
@both
@pytest.mark.parametrize("name", CASES)
def test_what_does_not_fit_is_named_before_anything_runs(name: str, impl: str) -> None:
    """Every dimension of every tensor halved, every tensor in dtypes that it cannot have."""
    case = CASES[name]
    good = _tensors(case)
    if impl == "torch":
        case.call({k: x.clone() for k, x in good.items()}, impl)
    bad = [
        (k, _halved(x, dim))
        for k, x in good.items()
        for dim in range(x.ndim)
        if (k, dim) not in case.free
    ]
    bad += [(k, x.flatten()) for k, x in good.items() if x.ndim > 1]
    bad += [
        (k, x.to(d))
        for k, x in good.items()
        for d in (torch.int64, torch.complex64, torch.float8_e4m3fn)
    ]
    silent = []
    for k, x in bad:
        given = {n: y.clone() for n, y in good.items()} | {k: x}
        try:
            case.call(given, impl)
        except ValueError as error:
            if f"`{k}`" not in str(error):
                silent.append(f"{k} {list(x.shape)} {x.dtype}: {error}")
            assert all(torch.equal(y, good[n]) for n, y in given.items() if n != k)
        else:
            silent.append(f"{k} {list(x.shape)} {x.dtype}: runs")
    assert not silent, "\n".join(silent)


def _tensors_of(found: object) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    return [] if found is None else [x for part in found for x in _tensors_of(part)]


def _spread(x: Tensor) -> Tensor:
    """The same numbers in every second place, NaN between them."""
    room = x.new_full((*x.shape, 2), torch.nan if x.is_floating_point() else 0)
    room[..., 0] = x
    return room[..., 0]


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_where_numbers_are_in_memory_does_not_matter(name: str) -> None:
    case = CASES[name]
    good = _tensors(case)
    wanted = _tensors_of(case.call({k: x.clone() for k, x in good.items()}, "torch"))
    for moved in (_spread, lambda x: x.transpose(0, -1).contiguous().transpose(0, -1)):
        given = {k: moved(x) for k, x in good.items()}
        if name == "planes":
            with pytest.raises(ValueError, match="`out` has strides"):
                case.call(given, "triton")
            given["out"] = good["out"].clone()
        found = _tensors_of(case.call(given, "torch"))
        for x, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(x, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


@torch.no_grad()
@both
@pytest.mark.parametrize("name", IN_PLACE)
def test_what_is_expanded_is_not_changed_in_place(name: str, impl: str) -> None:
    """A kernel would add to one place many times; gradients need no change in place."""
    case = CASES[name]
    good, k = _tensors(case), IN_PLACE[name]
    for dim in range(good[k].ndim):
        given = {**good, k: good[k].narrow(dim, 0, 1).expand(good[k].shape)}
        with pytest.raises(ValueError, match=f"`{k}` is expanded"):
            case.call(given, impl)


@both
@pytest.mark.parametrize("name", ["attention", "outer product mean"])
def test_a_second_derivative_is_refused(name: str, impl: str) -> None:
    """However it is asked for; the first may keep its graph."""
    given = _tensors(CASES[name])
    leaves = [given[k].requires_grad_() for k in list(given)[:2]]
    out = _tensors_of(CASES[name].call(given, impl))[0]
    found = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(sum(x.sum() for x in found), leaves, allow_unused=True)


def test_what_fitted_before_is_not_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """By shapes and dtypes, autocast included, on tensors without data too."""
    x, gain, weight = torch.zeros(3, 5, 7, 22), torch.zeros(22), torch.zeros(9, 22)
    given = (x, gain, gain, weight, None, None)
    half = (x, gain, gain, weight.bfloat16(), None, None)
    arguments.check("norm_linear_planes", *given)
    with pytest.raises(ValueError, match=r"`weight` has dtype torch.bfloat16; expected float32 as"):
        arguments.check("norm_linear_planes", *half)
    with torch.autocast("cpu", torch.bfloat16):
        arguments.check("norm_linear_planes", *half)
    with pytest.raises(ValueError, match="`weight`"):  # what autocast allows ends with it
        arguments.check("norm_linear_planes", *half)
    monkeypatch.setattr(arguments, "_shape_fault", None)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [None if t is None else mode.from_tensor(t) for t in given]
    for tensors in (given, fake, [None if t is None else t.to("meta") for t in given]):
        arguments.check("norm_linear_planes", *tensors)
    with torch.autocast("cpu", torch.bfloat16):
        arguments.check("norm_linear_planes", *half)


EMPTY = [
    (name, size)
    for name, case in CASES.items()
    for size in (B, N, S, V)
    if any(size in shape for shape in list(case.shapes.values())[:2])
    # Bins, channels and an empty set of keys are none of these; a layout has tokens.
    and not (size == N and ("tiled" in name or "pair bias" in name))
    and not (size == V and "outer" not in name)
    and not (size == S and "attention" in name)
]


@both
@pytest.mark.parametrize(("name", "size"), EMPTY)
def test_nothing_gives_nothing(name: str, size: int, impl: str) -> None:
    """No batch, no tokens, no sequences: empty results, gradients of zero."""
    case = CASES[name]
    shapes = {k: tuple(0 if n == size else n for n in s) for k, s in case.shapes.items()}
    given = {k: x.new_zeros(shapes[k]) for k, x in _tensors(case).items()}
    with torch.no_grad():
        results = case.call({k: x.clone() for k, x in given.items()}, impl)
    fixed = ("mask", "keep", "same", "count", "values", "positions.cols.period")
    leaves = [k for k, x in given.items() if x.is_floating_point() and k not in fixed]
    leaves = [k for k in leaves if not (k == "out" and name == "planes") and "logits" not in given]
    for k in leaves:
        given[k].requires_grad_()
    if name == "planes":
        given["out"] = None
    again = case.call(given, impl)
    for out in (*_tuple(results), *_tuple(again)):
        assert torch.equal(out, torch.zeros_like(out))
        assert not out.numel() or size == V
    if leaves:
        total = sum(x.sum() for x in _tuple(again))
        grads = torch.autograd.grad(total, [given[k] for k in leaves])
        for k, g in zip(leaves, grads, strict=True):
            kept = size == V and k in ("z", "bias")  # an outer product mean of nothing is its bias
            assert g.shape == given[k].shape and (kept or not g.any()), k


def _tuple(x: object) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else [t for t in x if t is not None]


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["triangle multiplication", "gated output", "outer product mean", "planes",
             "transition of a single track", "expected values of rows"]
)  # fmt: skip
def test_vectors_with_gaps_are_read_as_they_are(name: str) -> None:
    """Gains, shifts and biases that are every second element of something else."""
    case = CASES[name]
    data = ("z", "mask", "a", "b", "count", "x", "out", "o", "other", "same")
    good = {k: x[:1].clone() if k in data else x for k, x in _tensors(case).items()}
    gaps = {k: x.repeat_interleave(2)[::2] if x.ndim == 1 else x.clone() for k, x in good.items()}
    assert torch.equal(case.call(gaps, "triton"), case.call(good, "triton"))
