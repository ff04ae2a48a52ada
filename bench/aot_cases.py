"""Calls that launch every kernel in Boltz-2's shapes, on tensors without data (for bench.aot)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench import shapes


class Meta(shapes.Draw):
    """Shapes without data."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.device = dtype, torch.device("meta")
        self.generator, self.sequences = None, 128

    def normal(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        """An empty tensor."""
        return torch.empty(shape, dtype=self.dtype, device="meta")


def ops(draw: Meta, n: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, call) of every op in the benchmark's shapes."""
    from bench.providers import FOLDCP

    # Attention and positions come below; the single track is too wide for the fused transition.
    apart = ("relative_position", "transition_single")
    for name, op in shapes.OPS.items():
        if "attention" not in name and name not in apart:
            inputs = op.make(draw, n)
            yield name, lambda f=FOLDCP[name], t=inputs: f(t, "triton")()


def attention(draw: Meta, n: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Attention of every shape: masked, carried, per sample, per window, and its gradients."""
    from foldcp_kernels.attention import attend, attend_panel
    from foldcp_kernels.triangle_attention import triangle_attention

    weights = shapes._attention(draw, n)
    from bench.eager import attention_weights

    w = attention_weights(weights)
    for starting in (True, False):
        for mask in (None, weights["mask"]):
            yield (
                f"triangle attention {starting} {mask is not None}",
                lambda m=mask, s=starting: triangle_attention(weights["z"], m, w, s, "triton"),
            )

    def qkv(g0: int, g1: int, h: int, i: int, k: int, d: int, grad: bool = False) -> list[Tensor]:
        lines = (i, k, k)
        found = [draw.normal(g0, g1, x, h, d).transpose(2, 3) for x in lines]
        return [*found, draw.normal(g0, 1, h, i, -(-k // 16) * 16)[..., :k].requires_grad_(grad)]

    def panels() -> None:
        q, k, v, bias = qkv(1, n, 4, n, n, 32)
        first = attend_panel(q, k, v, bias, 0.2, None, False, "triton")
        second = attend_panel(q, k, v, bias, 0.2, first, False, "triton")
        attend_panel(q, k, v, bias, 0.2, second, True, "triton")

    yield "panels", panels
    shapes_of = {
        "lines": (1, n, 4, n, n, 32),
        "heads of 64": (1, n, 2, n, n, 64),
        "trunk": (1, 1, 16, n, n, 24),
        "diffusion": (1, 5, 16, n, n, 48),
        "diffusion, one sample": (1, 1, 16, n, n, 48),
        "windows": (n // 4, 5, 4, 32, 128, 32),
    }
    for name, shape in shapes_of.items():
        keep = torch.empty((shape[0], shape[1], shape[4]), dtype=torch.bool, device="meta")
        for kept in (None, keep):
            yield name, lambda s=shape, k=kept: attend(*qkv(*s), 0.2, k, impl="triton")

    def gradients(shape: tuple[int, ...], keep: Tensor | None) -> None:
        with torch.enable_grad():
            inputs = qkv(*shape, grad=True)
            torch.autograd.grad(attend(*inputs, 0.2, keep, "triton")[0].sum(), inputs[3])

    for shape in ((1, n, 4, n, n, 32), (1, 5, 16, n, n, 48)):
        keep = torch.empty((shape[0], shape[1], shape[4]), dtype=torch.bool, device="meta")
        for kept in (None, keep):
            yield "gradients", lambda s=shape, k=kept: gradients(s, k)


def contraction(draw: Meta, n: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """FP8 planes, and their contraction by one rank, over panels and with k first in memory."""
    from bench.eager import multiplication_weights
    from foldcp_kernels.core.dispatch import compute_dtype
    from foldcp_kernels.triangle_multiplication import triangle_multiplication
    from foldcp_kernels.triangle_multiplication.fused import fp8_contraction

    t = shapes.OPS["triangle_multiplication"].make(draw, n)
    w = multiplication_weights(t)
    for mask in (None, t["mask"]):
        yield (
            f"FP8 contraction {mask is not None}",
            lambda m=mask: triangle_multiplication(t["z"], m, w, True, "triton", "fp8"),
        )

    def planes(row: int, k_first: bool) -> tuple[Tensor, Tensor]:
        x = torch.empty((1, 128, n, row), dtype=torch.float8_e4m3fn, device="meta")[..., :n]
        return (x.transpose(2, 3), x) if k_first else (x, x.transpose(2, 3))

    def product(row: int, k_first: bool, carry: bool) -> None:
        dtype = torch.float32 if carry else compute_dtype(t["z"])
        to = torch.empty((1, 128, n, -(-n // 16) * 16), dtype=dtype, device="meta")[..., :n]
        scale = torch.empty(128, device="meta")
        fp8_contraction(to, *planes(row, k_first), scale, carry)

    for row in dict.fromkeys((-(-n // 16) * 16, n)):
        for k_first in (False, True):
            for carry in (False, True):
                name = f"FP8 product of rows of {row}, k first {k_first}, carry {carry}"
                yield name, lambda r=row, k=k_first, c=carry: product(r, k, c)


def heads(draw: Meta, n: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Relative positions, symmetric and separate heads, conditioned layers of tokens and atoms."""
    from foldcp_kernels.adaptive_norm.fused import adaptive_norm_fwd, gated_residual_fwd
    from foldcp_kernels.binned_heads.fused import expected_values_fwd
    from foldcp_kernels.relative_position.fused import relative_position_fwd

    z, dtype = draw.normal(1, n, n, 128), draw.dtype
    side = tuple(torch.empty(n, dtype=torch.int32, device="meta") for _ in range(3))
    period = torch.empty(n, device="meta")
    classes = torch.empty((5, 3), dtype=torch.int32, device="meta")
    table = torch.empty((12 * 131, 128), device="meta")
    for p in (None, period):
        yield (
            "relative position",
            lambda p=p: relative_position_fwd(z, z, table, side, side, p, classes, 32, 2, True),
        )
    values = torch.empty((2, 64), device="meta")
    same = torch.empty((1, n, n), dtype=torch.bool, device="meta")
    w = draw.normal(64, 128)
    yield (
        "separate heads",
        lambda: expected_values_fwd(z, w, values, None, z.transpose(1, 2), w, same),
    )
    for c in (128, 768):
        a, s = draw.normal(5, n, c), draw.normal(1, n, c)
        yield "adaptive norm", lambda a=a, s=s: adaptive_norm_fwd(a, s, s, dtype, True, 1e-5)
        yield "gated residual", lambda a=a, s=s: gated_residual_fwd(a, s, a, True)


@contextmanager
def autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """CUDA autocast; `torch.autocast` turns itself off where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype is not None)
    torch.set_autocast_dtype("cuda", dtype or before[1])
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


# name -> (dtype of tensors, dtype of products where autocast sets another)
MODES: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "bf16": (torch.bfloat16, None),
    "bf16 autocast": (torch.float32, torch.bfloat16),
    "fp16": (torch.float16, None),
    "fp32": (torch.float32, None),
}
