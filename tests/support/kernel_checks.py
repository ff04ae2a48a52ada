"""How a kernel is compared: float64 definition, and torch in the same dtype as the yardstick."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# bfloat16 only on a GPU: the interpreter computes its dots wrong.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE.type == "cuda" else [])
# Errors relative to the largest value that rounding alone explains: about two roundings of a
# result in the dtype; on a GPU, float32 products are three tf32 ones.
FLOOR = {
    torch.float32: 2e-6 if DEVICE.type == "cpu" else 2e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
FORWARD, BACKWARD = 2.0, 3.0  # of torch's own error; a backward has twice the products


def error(got: Tensor, want: Tensor, least: float = 1e-30) -> float:
    """Largest difference relative to the largest wanted value (`least` at least); inf for NaN."""
    if want.numel() == 0:
        return 0.0
    difference = (got.detach().double() - want.detach().double()).abs().max()
    size = want.detach().double().abs().max().clamp(min=least)
    return float(torch.nan_to_num(difference / size, nan=torch.inf))


def compare(
    name: str,
    got: Sequence[Tensor | None],
    want: Sequence[Tensor | None],
    torch_same: Sequence[Tensor | None],
    dtype: torch.dtype,
    factor: float = FORWARD,
) -> None:
    """Assert that each result is at most `factor` times as wrong as torch's, plus the floor.

    Args:
        name: of the case.
        got: the kernel's results.
        want: float64.
        torch_same: torch's in `dtype`.
        dtype: of the inputs.
        factor: allowed multiple.
    """
    # A gradient that cancels to zero is as exact as the size of what cancels allows.
    least = 0.3 * max(float(b.detach().abs().max()) for b in want if b is not None)
    for i, (a, b, c) in enumerate(zip(got, want, torch_same, strict=True)):
        assert (a is None) == (b is None), f"{name} result {i}: missing"
        if b is None:
            continue
        mine, theirs = error(a, b, least), error(c, b, least)
        bound = factor * theirs + FLOOR[dtype]
        assert mine <= bound, f"{name} result {i}: error {mine:.2e} above {bound:.2e}"


def cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A detached copy in a dtype (same strides), None for None."""
    if x is None or not x.is_floating_point():
        return x
    return x.detach().to(dtype, copy=True, memory_format=torch.preserve_format)


def check(
    name: str,
    op: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    dtype: torch.dtype,
    grads: bool = True,
) -> None:
    """Run an op as `triton`, `torch` and `reference` and compare, gradients too.

    Args:
        name: of the case.
        op: `op(*inputs, impl=...)`, a tensor or several.
        inputs: in float64; rounded to `dtype` first, so that all see the same numbers.
        dtype: of the inputs.
        grads: compare gradients as well.
    """
    rounded = [cast(x, dtype) for x in inputs]
    exact = [cast(x, torch.float64) for x in rounded]

    def run(values: Sequence[Tensor | None], impl: str) -> tuple[list, list]:
        with torch.no_grad():
            plain = [x if x is None else x.clone() for x in values]
            out = _tuple(op(*plain, impl=impl))
        if not grads:
            return list(out), []
        leaves = [
            x.detach().requires_grad_() if x is not None and x.is_floating_point() else x
            for x in values
        ]
        again = _tuple(op(*leaves, impl=impl))
        wanted = [x for x in leaves if x is not None and x.requires_grad]
        g = torch.Generator().manual_seed(1)
        douts = [torch.randn(o.shape, generator=g).to(o.device, o.dtype) for o in again]
        found = torch.autograd.grad(again, wanted, douts, allow_unused=True)
        return [*out, *again], list(found)

    want, want_grads = run(exact, "reference")
    got, got_grads = run(rounded, "triton")
    same, same_grads = run(rounded, "torch")
    compare(f"{name} {dtype}", got, want, same, dtype)
    if grads:
        compare(f"{name} {dtype} gradient", got_grads, want_grads, same_grads, dtype, BACKWARD)


def _tuple(x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else tuple(x)
