"""The parts of a triangle multiplication that a mesh runs: planes in, and the gated output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from foldcp_kernels.core.chunking import add_chunks, by_panel, chunk_length, spans
from foldcp_kernels.core.dispatch import compute_dtype, named
from foldcp_kernels.core.op import Op
from foldcp_kernels.norm_linear import EPS, refusal, slower
from foldcp_kernels.norm_linear.planes import of_both_halves
from foldcp_kernels.triangle_multiplication.definition import TriangleMultiplicationWeights


@dataclass(frozen=True)
class Parts:
    """Runners of the parts of a triangle multiplication, chosen before any of them runs.

    Args:
        planes: what runs the projection to planes.
        output: what runs the output.
        cuequivariance: cuEquivariance runs all of it where one rank has the whole pair tensor.
    """

    planes: str
    output: str
    cuequivariance: bool = False


def chosen(z: Tensor, w: TriangleMultiplicationWeights) -> Parts:
    """Choose what runs each part, by the default implementation.

    Args:
        z: pair tile [B, T_r, T_c, C].
        w: weights.
    """
    return choose_parts(z, w, None)


def choose_parts(z: Tensor, w: TriangleMultiplicationWeights, impl: str | None) -> Parts:
    """Choose what runs each part of an op that was called with `impl`.

    Args:
        z: pair tile [B, T_r, T_c, C].
        w: weights.
        impl: what the caller names.

    Raises:
        ValueError: a named implementation cannot run one of them.
    """
    if impl == "cuequivariance":
        return Parts("torch", "torch", True)
    planes = _PLANES.choose(z, impl=impl)
    output = _OUTPUT.choose(z, *(None,) * 6, w.p_out, impl=impl)
    return Parts(planes, output, named(impl) == "cuequivariance")


def run_cuequivariance(
    z: Tensor, mask: Tensor | None, w: TriangleMultiplicationWeights, outgoing: bool
) -> Tensor:
    """Run the whole op by cuEquivariance; in place when gradients are off.

    Args:
        z: [B, N, N, C].
        mask: [B, N, N], 1 = keep, or None.
        w: weights.
        outgoing: which of the two.

    Raises:
        ValueError: the package cannot run.
    """
    from foldcp_kernels.triangle_multiplication.cuequivariance import triangle_multiplication

    return triangle_multiplication(z, mask, w, outgoing)


def project_planes(
    z: Tensor,
    mask: Tensor | None,
    w: TriangleMultiplicationWeights,
    parts: Parts,
    channels: tuple[int, int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Project a tile to the planes a and b.

    Args:
        z: pair tile [B, T_r, T_c, C], any strides.
        mask: 1 = keep, [B, T_r, T_c], None keeps all.
        w: weights.
        parts: from `chosen`.
        channels: which of the D hidden channels (start, stop), None for all.
        out: where to write; not under autograd.

    Returns:
        [B, 2d, T_r, T_c]: a in the first d channels, b in the last; rows may be padded in memory.
    """
    norm = w.norm_in_weight, w.norm_in_bias
    given = z, mask, *norm, w.p_in, w.g_in, out
    return _PLANES.run(parts.planes, *given, channels=channels)


def plane_panels(
    z: Tensor,
    mask: Tensor | None,
    w: TriangleMultiplicationWeights,
    parts: Parts,
    channels: tuple[int, int],
    panels: int,
) -> tuple[Tensor, ...]:
    """Project planes panel by panel of the positions: [B, 2d, T_r, T_c / panels] each.

    Args:
        z: pair tile [B, T_r, T_c, C], any strides.
        mask: [B, T_r, T_c], 1 = keep; None keeps all.
        w: weights.
        parts: from `chosen`.
        channels: hidden channels (start, stop).
        panels: their number; it divides T_c.
    """
    if panels == 1:
        return (project_planes(z, mask, w, parts, channels),)
    if torch.is_grad_enabled():
        return project_planes(z, mask, w, parts, channels).chunk(panels, 3)
    b, i, j, _ = z.shape
    shape = (b, panels, 2 * (channels[1] - channels[0]), i, j // panels)
    out = z.new_empty(shape, dtype=compute_dtype(z))
    for n, part in enumerate(out):
        keep = None if mask is None else by_panel(mask[n], panels)
        project_planes(by_panel(z[n], panels), keep, w, parts, channels, part)
    return out.unbind(1)


def _planes(
    z: Tensor,
    mask: Tensor | None,
    gain: Tensor,
    shift: Tensor,
    p_in: Tensor,
    g_in: Tensor,
    planes: Tensor | None,
    channels: tuple[int, int] | None,
) -> Tensor:
    b, rows, cols, c = z.shape
    p_in, g_in = (of_both_halves(m, channels) for m in (p_in, g_in))
    width, parts = p_in.shape[0], []
    step = chunk_length(rows, b * cols * z.element_size() * 3 * width, z.device)
    for lo, hi in spans(rows, step):
        x = F.layer_norm(z[:, lo:hi], (c,), gain, shift, EPS)
        p = F.linear(x, p_in) * F.linear(x, g_in).sigmoid_()
        if mask is not None:
            p = p * mask[:, lo:hi, :, None].to(p.dtype)
        p = p.permute(0, 3, 1, 2)
        if torch.is_grad_enabled():
            parts.append(p)
            continue
        planes = p.new_empty((b, width, rows, cols)) if planes is None else planes
        planes[:, :, lo:hi] = p
    return torch.cat(parts, 2) if parts else planes


def gated_update(
    z: Tensor,
    x: Tensor,
    w: TriangleMultiplicationWeights,
    parts: Parts,
    residual: bool = True,
) -> Tensor:
    """Add the gated projection of the contraction to z; in place when gradients are off.

    Args:
        z: pair tile [B, T_r, T_c, C], any strides.
        x: the contraction [B, D, T_r, T_c].
        w: weights.
        parts: from `chosen`.
        residual: add z; without it z stays as it is and a new tensor is returned.

    Returns:
        [B, T_r, T_c, C].
    """
    norm_in, norm_out = (w.norm_in_weight, w.norm_in_bias), (w.norm_out_weight, w.norm_out_bias)
    given = z, *norm_in, w.g_out, x, *norm_out, w.p_out
    return _OUTPUT.run(parts.output, *given, residual=residual)


def _output(z: Tensor, *given: Tensor, residual: bool) -> Tensor:
    updates = _updates(z, *given)
    return add_chunks(z, 1, updates) if residual else torch.cat([u for _, u in updates], 1)


def _updates(
    z: Tensor, gain: Tensor, shift: Tensor, g_out: Tensor,
    x: Tensor, x_gain: Tensor, x_shift: Tensor, p_out: Tensor,
) -> Iterator[tuple[tuple[int, int], Tensor]]:  # fmt: skip
    b, rows, cols, c = z.shape
    step = chunk_length(rows, b * cols * c * z.element_size() * 5, z.device)
    for lo, hi in spans(rows, step):
        o = x[:, :, lo:hi].permute(0, 2, 3, 1)
        o = F.layer_norm(o, o.shape[-1:], x_gain, x_shift, EPS)
        gate = F.linear(F.layer_norm(z[:, lo:hi], (c,), gain, shift, EPS), g_out).sigmoid_()
        yield (lo, hi), F.linear(o, p_out) * gate


def _fused_planes() -> Callable[..., Tensor]:
    from foldcp_kernels.norm_linear.fused import gated_planes

    return gated_planes


def _fused_output() -> Callable[..., Tensor]:
    from foldcp_kernels.gated_output.fused import multiplication_output

    return multiplication_output


_PLANES = Op(
    "triangle_multiplication",
    eager=_planes,
    triton=_fused_planes,
    covers=lambda z, *_: refusal(z, "z", (z.shape[-1],)),
    prefers=lambda z, *_: slower(z),
)
_OUTPUT = Op(
    "triangle_multiplication output",
    eager=_output,
    triton=_fused_output,
    covers=lambda z, *given: refusal(z, "z", given[-1].shape),
    prefers=lambda z, *_: slower(z),
    in_place=True,
)
