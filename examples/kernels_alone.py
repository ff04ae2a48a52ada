"""The kernels by themselves, forward and backward, in your own model: no mesh and no Boltz.

    python examples/kernels_alone.py                    # Triton in bf16 on a GPU, or torch in fp32
    python examples/kernels_alone.py --tokens 512

Look at: both errors are against the same op's definition in float64, relative to its largest value;
weights are plain tensors in a dataclass whose docstring has their shapes; `impl=` forces an
implementation; without gradients the ops change `z` in place.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from foldcp_kernels import triangle_attention, triangle_multiplication
from foldcp_kernels.triangle_attention import TriangleAttentionWeights
from foldcp_kernels.triangle_multiplication import TriangleMultiplicationWeights

C, HEADS, D = 128, 4, 32  # those of Boltz: channels, heads, channels of a head
Op = Callable[[Tensor, list[Tensor], str | None], Tensor]


def multiplication(z: Tensor, w: list[Tensor], impl: str | None) -> Tensor:
    """Triangle multiplication, outgoing edges."""
    return triangle_multiplication(z, None, TriangleMultiplicationWeights(*w), True, impl)


def attention(z: Tensor, w: list[Tensor], impl: str | None) -> Tensor:
    """Triangle attention around the starting node."""
    return triangle_attention(z, None, TriangleAttentionWeights(*w, HEADS), True, impl)


SHAPES: dict[Op, list[tuple[int, ...]]] = {
    multiplication: [(C,), (C,), (2 * C, C), (2 * C, C), (C,), (C,), (C, C), (C, C)],
    attention: [(C,), (C,), (HEADS, C), *4 * [(HEADS * D, C)], (C, HEADS * D)],
}


def run(op: Op, tensors: list[Tensor], impl: str | None) -> list[Tensor]:
    """The update of z, the gradient of z and those of all weights."""
    z, *weights = (t.detach().requires_grad_() for t in tensors)
    out = op(z, weights, impl)
    (out - z).float().square().sum().backward()
    return [(out - z).detach(), *(t.grad for t in (z, *weights))]


def error(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest of the errors of some tensors, each relative to its own largest value."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, want, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--impl", choices=["auto", "torch", "triton"], default="auto")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    torch.manual_seed(0)
    for op, shapes in SHAPES.items():
        shapes = [(1, options.tokens, options.tokens, C), *shapes]
        tensors = [torch.randn(s) * (s[-1] ** -0.5 if len(s) == 2 else 1) for s in shapes]
        tensors = [t.to(device, dtype) for t in tensors]
        run(op, tensors, options.impl)  # the first call compiles
        start = time.perf_counter()
        got = run(op, tensors, options.impl)
        if gpu:
            torch.cuda.synchronize()
        took = time.perf_counter() - start
        want = run(op, [t.double() for t in tensors], "reference")
        off = error(got[:1], want[:1]), error(got[1:], want[1:])
        print(
            f"{op.__name__}: {options.tokens} tokens on {device}, forward and backward "
            f"{took * 1e3:.1f} ms, error {off[0]:.0e}, of gradients {off[1]:.0e}"
        )


if __name__ == "__main__":
    main()
