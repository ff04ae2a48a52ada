"""Sizes that kernels take, and those that run in torch under `auto`, each said once."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from foldcp_kernels.attention import fused as attention
from foldcp_kernels.core import dispatch
from foldcp_kernels.gated_output import fused as gated_output
from foldcp_kernels.norm_linear import fused as norm_linear
from foldcp_kernels.outer_product_mean import fused as outer_product
from foldcp_kernels.outer_product_mean import outer_product_mean
from foldcp_kernels.pair_weighted_averaging import (
    PairWeightedAveragingWeights,
    pair_weighted_averaging,
)
from foldcp_kernels.transition import TransitionWeights, transition
from foldcp_kernels.transition import fused as swiglu
from foldcp_kernels.triangle_attention import TriangleAttentionWeights, triangle_attention
from foldcp_kernels.triangle_multiplication import (
    TriangleMultiplicationWeights,
    triangle_multiplication,
)


def _wide(shapes: dict, seed: int = 0) -> dict:
    g = torch.Generator().manual_seed(seed)
    return {k: torch.randn(x, generator=g) * x[-1] ** -0.5 for k, x in shapes.items()}


def _wide_transition(c: int, *lead: int) -> Callable[[str | None], Tensor]:
    t = _wide(dict(x=(*lead, c), gain=(c,), shift=(c,), fc1=(8, c), fc2=(8, c), fc3=(c, 8)))
    return lambda i: transition(t["x"].clone(), TransitionWeights(*list(t.values())[1:]), impl=i)


def _wide_multiplication(c: int, d: int) -> Callable[[str | None], Tensor]:
    pairs, inner, outer = (2 * d, c), (d,), (c,)
    w = _wide(dict(enumerate((outer, outer, pairs, pairs, inner, inner, (c, d), (c, c)))))
    z = _wide(dict(z=(1, 3, 3, c)))["z"]
    w = TriangleMultiplicationWeights(*w.values())
    return lambda i: triangle_multiplication(z.clone(), None, w, True, i)


def _wide_heads(d: int) -> Callable[[str | None], Tensor]:
    shapes = ((16,), (16,), (1, 16), *[(d, 16)] * 4, (16, d))
    w = TriangleAttentionWeights(*_wide(dict(enumerate(shapes))).values(), 1)
    z = _wide(dict(z=(1, 3, 3, 16)))["z"]
    return lambda i: triangle_attention(z.clone(), None, w, True, i)


def _wide_averaging(c: int) -> Callable[[str | None], Tensor]:
    shapes = ((16,), (16,), (c,), (c,), (8, 16), (8, 16), (1, c), (16, 8))
    w = PairWeightedAveragingWeights(*_wide(dict(enumerate(shapes))).values(), 1)
    t = _wide(dict(m=(1, 2, 3, 16), z=(1, 3, 3, c)))
    return lambda i: pair_weighted_averaging(t["m"].clone(), t["z"], w, i)


def _wide_outer(d: int, c: int) -> Callable[[str | None], Tensor]:
    t = _wide(dict(z=(1, 3, 2, c), a=(1, 4, 3, d), b=(1, 4, 2, d), weight=(c, d * d), bias=(c,)))
    count = torch.ones(1, 3, 2)
    return lambda i: outer_product_mean(t["z"].clone(), t["a"], t["b"], count, t["weight"],
                                        t["bias"], i)  # fmt: skip


NO_KERNEL = {
    "transition": (_wide_transition, [(384, 2, 3, 2), (768, 2, 3)], "`x` has {0} channels"),
    "triangle_multiplication": (_wide_multiplication, [(384, 32), (512, 32)], "`z` has {0} ch"),
    "triangle_multiplication output": (
        _wide_multiplication, [(32, 384), (32, 768)], "{1} hidden channels"
    ),
    "attention": (_wide_heads, [(96,), (128,)], "head dim {0}; expected at most 64"),
    "norm_linear_planes": (_wide_averaging, [(384,), (512,)], "`. ?` has {0} channels"),
    "outer_product_mean": (_wide_outer, [(96, 16), (128, 16)], "`a` has {0} channels"),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("op", NO_KERNEL)
def test_sizes_of_no_kernel_run_in_torch_and_say_so_once(
    op: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Under `auto`; a kernel that is named is refused before anything runs."""
    make, sizes, why = NO_KERNEL[op]
    monkeypatch.setattr(dispatch, "triton_runs", lambda device: True)
    dispatch._log.cache_clear()
    for size in sizes:
        call, said = make(*size), re.compile(why.replace(". ?", "[a-z]").format(*size))
        caplog.clear()
        with caplog.at_level(logging.INFO, "foldcp.kernels"):
            found = [call(None) for _ in range(2)]
        (line,) = [m for m in caplog.messages if m.startswith(f"{op} on") and said.search(m)]
        assert ": torch (" in line
        want = call("reference")
        assert all(torch.allclose(x, want, rtol=1e-4, atol=1e-5) for x in found)
        for kernel in (attention, gated_output, norm_linear, outer_product, swiglu):
            monkeypatch.setattr(kernel, "launch", None)
        with pytest.raises(ValueError, match=f"impl='triton' cannot run: .*{said.pattern}"):
            call("triton")
        monkeypatch.undo()
        monkeypatch.setattr(dispatch, "triton_runs", lambda device: True)


@torch.no_grad()
@pytest.mark.parametrize("call", [_wide_outer(8, 384), _wide_transition(40, 2, 3)])
def test_kernels_take_what_they_can(call: Callable[[str | None], Tensor]) -> None:
    """An outer product mean of any width, and the single track's three dimensions."""
    assert torch.allclose(call("triton"), call("reference"), rtol=1e-4, atol=1e-5)
