"""The parts of a triangle multiplication that a mesh runs: planes in, and the gated output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from foldcp_kernels.core.chunking import add_chunks, by_panel, chunk_length, spans
from foldcp_kernels.core.dispatch import compute_dtype, named
from foldcp_kernels.core.op import Op
from foldcp_kernels.norm_linear import EPS, refusal, slower
from foldcp_kernels.norm_linear.planes import of_both_halves, padded_planes
from foldcp_kernels.triangle_multiplication import fp8
from foldcp_kernels.triangle_multiplication.contraction import FP8_PRODUCTS
from foldcp_kernels.triangle_multiplication.definition import TriangleMultiplicationWeights


@dataclass(frozen=True)
class Parts:
    """Runners of the parts of a triangle multiplication, chosen before any of them runs.

    Args:
        planes: what runs the projection to planes.
        output: what runs the output.
        cuequivariance: cuEquivariance runs all of it where one rank has the whole pair tensor.
        fp8: what contracts planes in FP8; "" where planes are in what is computed in.
    """

    planes: str
    output: str
    cuequivariance: bool = False
    fp8: str = ""

    def dtype(self, z: Tensor) -> torch.dtype:
        """Return the dtype of the planes of a tile."""
        return fp8.DTYPE if self.fp8 else compute_dtype(z)


def chosen(z: Tensor, w: TriangleMultiplicationWeights, contraction: str = "same") -> Parts:
    """Choose what runs each part, by the default implementation.

    Args:
        z: pair tile [B, T_r, T_c, C].
        w: weights.
        contraction: "same" or "fp8", see `triangle_multiplication`.

    Raises:
        ValueError: `contraction` is unknown, or cannot run.
    """
    return choose_parts(z, w, None, contraction)


def choose_parts(
    z: Tensor, w: TriangleMultiplicationWeights, impl: str | None, contraction: str = "same"
) -> Parts:
    """Choose what runs each part of an op that was called with `impl`.

    Args:
        z: pair tile [B, T_r, T_c, C].
        w: weights.
        impl: what the caller names.
        contraction: "same" or "fp8", see `triangle_multiplication`.

    Raises:
        ValueError: a named implementation cannot run one of them, or `contraction` is unknown.
    """
    if contraction not in fp8.FORMATS:
        allowed = ", ".join(fp8.FORMATS)
        raise ValueError(f"`contraction` must be one of {allowed}, got {contraction!r}")
    in_fp8 = contraction == "fp8"
    if in_fp8:
        _refuse_fp8(named(impl))
    if impl == "cuequivariance":
        return Parts("torch", "torch", True)
    fp8_by = FP8_PRODUCTS.choose(z, impl=impl) if in_fp8 else ""
    planes = (_FP8_PLANES if in_fp8 else _PLANES).choose(z, impl=impl)
    output = _OUTPUT.choose(z, *(None,) * 6, w.p_out, impl=impl)
    return Parts(planes, output, named(impl) == "cuequivariance", fp8_by)


def _refuse_fp8(name: str) -> None:
    """Refuse what an FP8 contraction cannot run with."""
    if torch.is_grad_enabled():
        raise ValueError(
            "the FP8 contraction has no gradients: call it under torch.no_grad(), or use "
            "contraction='same'"
        )
    if name == "cuequivariance":
        raise ValueError(
            "cuequivariance has no FP8 contraction: use contraction='same', or impl='auto'"
        )


def scaled_planes(
    z: Tensor, w: TriangleMultiplicationWeights, parts: Parts, channels: tuple[int, int]
) -> fp8.Scaled | None:
    """Say what the FP8 planes of some channels stand for; None where planes are not in FP8.

    Args:
        z: the tile that they are made of.
        w: weights.
        parts: from `chosen`.
        channels: which of the D hidden channels (start, stop).
    """
    if not parts.fp8:
        return None
    scales = fp8.product_scales(w.p_in, w.norm_in_weight, w.norm_in_bias)
    return fp8.Scaled(parts.fp8, scales[slice(*channels)], compute_dtype(z))


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
        In FP8 they are divided by their scales, see `scaled_planes`.
    """
    norm = w.norm_in_weight, w.norm_in_bias
    p_in = fp8.scaled_weight(w.p_in, *norm) if parts.fp8 else w.p_in
    given = z, mask, *norm, p_in, w.g_in, out
    dtype = parts.dtype(z) if parts.fp8 else None
    return _PLANES.run(parts.planes, *given, channels=channels, dtype=dtype)


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
    out = z.new_empty(shape, dtype=parts.dtype(z))
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
    dtype: torch.dtype | None,
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
        if planes is None and dtype is not None:
            planes = padded_planes(z, width, dtype)
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
_FP8_PLANES = replace(_PLANES, covers=lambda z, *_: fp8.fault(z) or _PLANES.covers(z))
_OUTPUT = Op(
    "triangle_multiplication output",
    eager=_output,
    triton=_fused_output,
    covers=lambda z, *given: refusal(z, "z", given[-1].shape),
    prefers=lambda z, *_: slower(z),
    in_place=True,
)
