"""Attention at any size of its logits: as the float64 definition, forward and backward.

One row of queries per case, so that a few calls see them all; rows of one block differ on purpose.
"""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, error
from torch import Tensor

from foldcp_kernels.attention import attend, attend_panel
from foldcp_kernels.core import definitions as reference
from foldcp_kernels.triangle_attention import TriangleAttentionWeights, triangle_attention

LARGEST = torch.finfo(torch.float32).max
KEYS = 70  # three blocks of the kernels, the last one ragged
FILLS = (-1e6, -1e9, -1e30, -LARGEST, 1e9, 1e30, 3e38, LARGEST)
# Float64 itself resolves 1e-7 beside 1e9: the definition is no more exact there.
TOLERANCE = 5e-6


def _cases() -> Tensor:
    """[1, 1, 1, cases, KEYS] in float32: fills on one, some, most and all keys, and offsets."""
    keys = torch.arange(KEYS)
    rows = []
    for fill in FILLS:
        for where in (keys == 50, keys % 3 == 1, keys < 36, keys >= 20, keys >= 0):
            rows.append(torch.where(where, fill, 0.0))
    rows += [torch.full((KEYS,), x) for x in (-1e9, 1e9, -1e5, 1e5)]
    bias = torch.stack(rows)
    noise = torch.randn(bias.shape, generator=torch.Generator().manual_seed(0))
    # What fills overwrite carries no noise; the last rows are offsets that rounding spreads.
    noise[:-4] = torch.where(bias[:-4] == 0, noise[:-4], 0.0)
    return (bias + noise)[None, None, None].to(DEVICE)


def _inputs(queries: int, heads: int = 1) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    shapes = [(1, 2, heads, n, 16) for n in (queries, KEYS, KEYS, queries)]
    return [torch.randn(s, generator=g).to(DEVICE) for s in shapes]


def _close(name: str, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        e = error(a, b, 0.1)
        assert e < TOLERANCE, f"{name}, result {i}: {e:.1e}"


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("rows", [slice(None), slice(None, None, 2)], ids=["lazy", "exact"])
def test_any_finite_logits(impl: str, rows: slice) -> None:
    """At once and in panels that are merged; with few queries the kernels take each maximum."""
    bias = _cases()[..., rows, :]
    *tensors, dout = _inputs(bias.shape[3])
    values = (*tensors, bias)

    def run(impl: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).requires_grad_() for x in values]
        o, lse = attend(*leaves, 0.25, impl=impl)
        return o, lse, *torch.autograd.grad(o, leaves, dout.to(dtype))

    want = run("reference", torch.float64)
    _close("with gradients", run(impl, torch.float32), want)
    with torch.no_grad():
        _close("without", attend(*values, 0.25, impl=impl), want[:2])
        if impl == "torch":
            _close("float64", attend(*(x.double() for x in values), 0.25, impl=impl), want[:2])

    def panels(leaves: list[Tensor]) -> tuple[Tensor, Tensor]:
        q, k, v, b = leaves
        carry = None
        for lo, hi in ((0, 20), (20, 36), (36, KEYS)):
            part = (k[..., lo:hi, :], v[..., lo:hi, :], b[..., lo:hi])
            carry = attend_panel(q, *part, 0.25, carry, hi == KEYS, impl)
        return carry.finish()

    with torch.no_grad():
        _close("panels", panels(list(values)), want[:2])
    leaves = [x.clone().requires_grad_() for x in values]
    o, lse = panels(leaves)
    grads = torch.autograd.grad(o, leaves, dout)
    _close("panels with gradients", (o, lse, *grads), want)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_the_number_of_keys_is_not_lost(impl: str) -> None:
    """Keys alike beside any offset: their mean, to the bit, however they are cut in panels."""
    # Rows: offsets; each of their panels has 8 keys.
    offsets = torch.tensor([-1e6, -1e9, 1e9, -1e30, -LARGEST], device=DEVICE).repeat(7)[:, None]
    q, kv = (torch.zeros(1, 1, 1, n, 16, device=DEVICE) for n in (35, 40))
    for grad in (False, True):
        bias = offsets.expand(1, 1, 1, 35, 40).contiguous().requires_grad_(grad)
        assert torch.equal(attend(q, kv, kv + 1, bias, 1.0, impl=impl)[0], q + 1)
        carry = None
        for lo in range(0, 40, 8):
            part = (kv[..., :8, :], kv[..., :8, :] + 1, bias[..., lo : lo + 8])
            carry = attend_panel(q, *part, 1.0, carry, False, impl)
        assert torch.equal(carry.finish()[0], q + 1)


@pytest.mark.parametrize("impl,starting", [("torch", True), ("torch", False), ("triton", True)])
def test_soft_masks_mean_what_they_mean_in_boltz(impl: str, starting: bool) -> None:
    """A key's logit loses 1e9 (1 - mask): the largest mask of a line decides, be it 0, 0.6 or 1."""
    g = torch.Generator().manual_seed(2)
    n, c, heads = 7, 16, 2
    shapes = [(c,), (c,), (heads, c), *[(c, c)] * 5]
    weights = [torch.randn(s, generator=g) * c**-0.5 for s in shapes]
    z, mask = torch.randn(1, n, n, c, generator=g), torch.rand(1, n, n, generator=g).round()
    mask[0, 0], mask[0, :, 1], mask[0, 2], mask[0, :, 3] = 0, 0, 0.6, 0.6
    mask[0, 2, ::2], mask[0, ::3, 3] = 0.25, 0.5
    op = TriangleAttentionWeights(*(w.to(DEVICE) for w in weights), heads)
    exact = TriangleAttentionWeights(*(w.double().to(DEVICE) for w in weights), heads)
    z, mask = z.to(DEVICE), mask.to(DEVICE)
    want = reference.triangle_attention(z.double(), mask.double(), exact, starting)
    got = triangle_attention(z.clone(), mask, op, starting, impl)
    assert error(got, want) < TOLERANCE
    whole = reference.triangle_attention(z.double(), (mask > 0.5).double(), exact, starting)
    assert error(whole, want) > 1e-2, "the masks of this test do not tell"
    same = triangle_attention(z.clone(), mask == 1, op, starting, impl)
    whole = reference.triangle_attention(z.double(), (mask == 1).double(), exact, starting)
    assert error(same, whole) < TOLERANCE, "bool"
