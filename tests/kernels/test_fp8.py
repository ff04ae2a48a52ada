"""FP8 planes and their contraction: the kernel against float64, the scales, and what is refused."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from kernel_checks import DEVICE
from torch import Tensor

from foldcp_kernels.core import triton_launch
from foldcp_kernels.core.dispatch import using
from foldcp_kernels.triangle_multiplication import (
    TriangleMultiplicationWeights,
    definition,
    fp8,
    triangle_multiplication,
)
from foldcp_kernels.triangle_multiplication.contraction import contract
from foldcp_kernels.triangle_multiplication.parts import choose_parts, project_planes

C = 128


def planes(seed: int, *shape: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (40 * torch.randn(shape, generator=g)).to(fp8.DTYPE).to(DEVICE)


def weights(seed: int = 3, c: int = C) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(c,), (c,), (2 * c, c), (2 * c, c), (c,), (c,), (c, c), (c, c)]
    drawn = [torch.randn(s, generator=g) for s in shapes]
    return [(x / c**0.5 if x.ndim == 2 else 1 + x / 4).to(DEVICE) for x in drawn]


@pytest.mark.parametrize("runner", ["triton", "torch"])
@pytest.mark.parametrize("outgoing", [True, False], ids=["k last", "k first"])
@pytest.mark.parametrize("rows,cols,k", [(1, 1, 1), (35, 20, 17), (130, 48, 160), (16, 140, 330)])
def test_contraction_over_panels(rows: int, cols: int, k: int, outgoing: bool, runner: str) -> None:
    """One panel and three, batches, rows that begin anywhere in memory and rows that are padded."""
    d, batch = 3, 2
    scale = torch.tensor([2.0**-9, 1.0, 2.0**7], device=DEVICE)
    for panels in (1, 3):
        for room in (0, -k % 16):  # behind each row
            a, b = (
                planes(i, batch, d, panels, n, k + room)[..., :k]
                for i, n in enumerate((rows, cols))
            )
            want = torch.einsum("bdpik,bdpjk->bdij", a.double(), b.double())
            want *= scale.double()[:, None, None]
            scaled, acc = fp8.Scaled(runner, scale, torch.float32), None
            with torch.no_grad():
                for p in range(panels):
                    x, y = a[:, :, p], b[:, :, p]
                    if not outgoing:
                        x, y = (t.transpose(2, 3) for t in (x, y))
                        x, y = (x, y) if room else (x.contiguous(), y.contiguous())
                    acc = contract(acc, x, y, outgoing, panels, scaled=scaled)
            assert acc is not None and acc.dtype == torch.float32
            for c in range(d):  # each channel by its own size
                off = (acc[:, c] - want[:, c]).norm() / want[:, c].norm()
                assert off < 1e-6, (panels, room, c, float(off))


def test_planes_of_triton_are_those_of_torch() -> None:
    """But for float32 sums that fall on two sides of the middle between two e4m3 numbers."""
    n, w = 21, TriangleMultiplicationWeights(*weights())
    z = torch.randn(2, n, n, C, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    mask = (torch.rand(2, n, n, generator=torch.Generator().manual_seed(2)) > 0.3).float()
    found = {}
    with torch.no_grad():
        for impl in ("torch", "triton"):
            parts = choose_parts(z, w, impl, "fp8")
            assert parts.fp8 == parts.planes == impl
            found[impl] = project_planes(z, mask.to(DEVICE), w, parts, (3, 77))
            assert found[impl].dtype == fp8.DTYPE and found[impl].shape == (2, 148, n, n)
            assert found[impl].stride(2) % 16 == 0
    ours, twin = (found[x].float() for x in ("triton", "torch"))
    assert (ours != twin).float().mean() < 1e-4
    assert ((ours - twin).abs() <= twin.abs() / 8 + 2**-9).all()


def test_scales_cannot_overflow() -> None:
    """The input that drives each plane to its bound, with every gate open, stays a number."""
    w = weights()
    w[1] = 4 * w[1]  # shift
    p_in, gain, shift = w[2], w[0], w[1]
    scales = fp8.channel_scales(p_in, gain, shift)
    assert (scales.log2() == scales.log2().round()).all()
    least = scales / 2  # half of it would overflow for some input: no scale is larger than needed
    for sign in (1, -1):
        x = sign * p_in * gain  # row c: the normed input that is aligned with channel c
        x = x - x.mean(1, keepdim=True)
        x = C**0.5 * x / x.norm(dim=1, keepdim=True) * gain + shift
        most = (x.double() * p_in.double()).sum(1).abs()
        assert (most / scales <= fp8.LARGEST).all()
        bound = C**0.5 * (p_in * gain).double().norm(dim=1) + (p_in @ shift).double().abs()
        assert (bound / least > fp8.LARGEST * (1 - 1e-6)).all()
    odd = fp8.channel_scales(torch.tensor([[0.0, 0.0], [torch.nan, 1.0]]), gain[:2], shift[:2])
    assert odd.tolist() == [1, 1]


def test_what_is_made_of_weights_follows_them() -> None:
    p_in, gain, shift = weights()[2], *weights()[:2]
    first = fp8.product_scales(p_in, gain, shift)
    assert fp8.product_scales(p_in, gain, shift) is first
    scaled = fp8.scaled_weight(p_in, gain, shift)
    with torch.no_grad():
        p_in.mul_(4)
    assert torch.equal(fp8.product_scales(p_in, gain, shift), 16 * first)
    assert torch.equal(fp8.scaled_weight(p_in, gain, shift), scaled)


def call(impl: str | None = "triton", contraction: str = "fp8", grad: bool = False) -> Tensor:
    z = torch.randn(1, 5, 5, C, device=DEVICE)
    with torch.set_grad_enabled(grad):
        w = TriangleMultiplicationWeights(*weights())
        return triangle_multiplication(z, None, w, True, impl, contraction)


def test_what_cannot_run_is_refused() -> None:
    with mock.patch.object(triton_launch, "capability", lambda _: 80):
        with pytest.raises(ValueError, match=r"sm_80 GPU has no FP8 .* use contraction='same'"):
            call()
        call("torch")
    with pytest.raises(ValueError, match="`contraction` must be one of same, fp8, got 'fp4'"):
        call(contraction="fp4")
    with pytest.raises(ValueError, match="no gradients: call it under"):
        call(grad=True)
    with pytest.raises(ValueError, match="cuequivariance has no FP8 contraction"):
        call("cuequivariance")
    with using("torch"):
        call(None)


def test_one_definition_and_one_op() -> None:
    """The rounding of the definition, which has its own words for the scales, is that of the op."""
    w = TriangleMultiplicationWeights(*(x.double() for x in weights()))
    z = torch.randn(1, 19, 19, C, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    z, keep = z.to(DEVICE), torch.ones(1, 19, 19, dtype=torch.float64, device=DEVICE)
    with torch.no_grad():
        parts = choose_parts(z, w, "torch", "fp8")
        ab = project_planes(z, keep, w, parts)
        scale = fp8.product_scales(w.p_in, w.norm_in_weight, w.norm_in_bias)
        scaled = fp8.Scaled("torch", scale, z.dtype)
        got = contract(None, ab[:, :C], ab[:, C:], True, scaled=scaled).permute(0, 2, 3, 1)
        want = definition.contraction(z, keep, w, True, fp8=True)
    assert ((got - want).norm() / want.norm()) < 1e-12
