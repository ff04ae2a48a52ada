"""The local parts of triangle multiplication: planes in, contraction, gated output.

    a, b = mask * sigmoid(LN(z) Wg) * (LN(z) Wp)            planes, channel-major
    x_ij = sum_k a_ik b_jk   (outgoing)    or    sum_k a_ki b_kj   (incoming)
    z_ij += (LN(x_ij) Wo) * sigmoid(LN(z_ij) Wgo)

Source: AlphaFold 2 supplement, Algorithms 11 and 12; AlphaFold 3 supplement, Algorithms 12 and 13.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from foldcp_kernels.core.arguments import check
from foldcp_kernels.core.chunking import add_chunks, by_panel, chunk_length, spans
from foldcp_kernels.core.dispatch import compute_dtype, derived
from foldcp_kernels.core.recompute import nothing, recompute
from foldcp_kernels.norm_linear import EPS, cast, choose_rows
from foldcp_kernels.triangle_attention import swapped
from foldcp_kernels.triangle_multiplication.contraction import accumulated as accumulated
from foldcp_kernels.triangle_multiplication.contraction import contract
from foldcp_kernels.triangle_multiplication.definition import TriangleMultiplicationWeights


def project_planes(
    z: Tensor,
    mask: Tensor | None,
    w: TriangleMultiplicationWeights,
    channels: tuple[int, int] | None = None,
    impl: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Project a tile to the planes a and b.

    Args:
        z: pair tile [B, T_r, T_c, C], any strides.
        mask: 1 = keep, [B, T_r, T_c], None keeps all.
        w: weights.
        channels: which of the D hidden channels (start, stop), None for all.
        impl: see `dispatch`.
        out: where to write; not under autograd.

    Returns:
        [B, 2d, T_r, T_c]: a in the first d channels, b in the last; rows may be padded in memory.
    """
    half = w.p_in.shape[0] // 2
    lo, hi = channels or (0, half)
    width = 2 * (hi - lo)

    def pick(m: Tensor) -> Tensor:
        return m if hi - lo == half else torch.cat((m[lo:hi], m[half + lo : half + hi]))

    if choose_rows("triangle_multiplication", impl, z, "z", (z.shape[-1],)) != "triton":
        pair = pick(w.p_in), pick(w.g_in)
        return _planes(z, mask, w.norm_in_weight, w.norm_in_bias, *pair, out)
    from foldcp_kernels.norm_linear.fused import norm_linear_fwd

    dtype = compute_dtype(z)

    def stacked(name: str, m: Tensor) -> Tensor:
        return derived(name, (m,), lambda m: pick(m).to(dtype).contiguous(), dtype, lo, width)

    def fused(z: Tensor, gain: Tensor, shift: Tensor, p_in: Tensor, g_in: Tensor) -> Tensor:
        p, g = stacked("p_in", p_in), stacked("g_in", g_in)
        return norm_linear_fwd(z, gain, shift, p, planes=True, gate=g, mask=mask, out=out)

    def twin(z: Tensor, gain: Tensor, shift: Tensor, p_in: Tensor, g_in: Tensor) -> Tensor:
        return _planes(z, mask, gain, shift, pick(p_in), pick(g_in))

    return recompute(fused, twin, z, w.norm_in_weight, w.norm_in_bias, w.p_in, w.g_in)


def plane_panels(
    z: Tensor,
    mask: Tensor | None,
    w: TriangleMultiplicationWeights,
    channels: tuple[int, int],
    panels: int,
) -> tuple[Tensor, ...]:
    """Project planes panel by panel of the positions: [B, 2d, T_r, T_c / panels] each.

    Args:
        z: pair tile [B, T_r, T_c, C], any strides.
        mask: [B, T_r, T_c], 1 = keep; None keeps all.
        w: weights.
        channels: hidden channels (start, stop).
        panels: their number; it divides T_c.
    """
    if panels == 1:
        return (project_planes(z, mask, w, channels),)
    if torch.is_grad_enabled():
        return project_planes(z, mask, w, channels).chunk(panels, 3)
    b, i, j, _ = z.shape
    shape = (b, panels, 2 * (channels[1] - channels[0]), i, j // panels)
    out = z.new_empty(shape, dtype=compute_dtype(z))
    for n, part in enumerate(out):
        keep = None if mask is None else by_panel(mask[n], panels)
        project_planes(by_panel(z[n], panels), keep, w, channels, out=part)
    return out.unbind(1)


def _planes(
    z: Tensor,
    mask: Tensor | None,
    gain: Tensor,
    shift: Tensor,
    p_in: Tensor,
    g_in: Tensor,
    planes: Tensor | None = None,
) -> Tensor:
    b, rows, cols, c = z.shape
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
    residual: bool = True,
    impl: str | None = None,
) -> Tensor:
    """Add the gated projection of the contraction to z; in place when gradients are off.

    Args:
        z: pair tile [B, T_r, T_c, C], any strides.
        x: the contraction [B, D, T_r, T_c].
        w: weights.
        residual: add z; without it z stays as it is and a new tensor is returned.
        impl: see `dispatch`.

    Returns:
        [B, T_r, T_c, C].
    """
    widths = (z.shape[-1], x.shape[1])
    if choose_rows("triangle_multiplication output", impl, z, "z", widths) != "triton":
        if residual:
            return add_chunks(z, 1, _updates(z, x, w))
        return torch.cat([u for _, u in _updates(z, x, w)], 1)
    from foldcp_kernels.gated_output.fused import multiplication_output_fwd

    dtype = compute_dtype(z)
    in_place = residual and not torch.is_grad_enabled()

    def fused(*t: Tensor) -> Tensor:
        z, gain, shift, g_out, x, x_gain, x_shift, p_out = t
        gate, weight = cast("g_out", dtype, g_out), cast("p_out", dtype, p_out)
        x = x if x.stride(-1) == 1 else x.contiguous()
        return multiplication_output_fwd(
            z, gain, shift, gate, x, x_gain, x_shift, weight, z if in_place else None, residual
        )

    def twin(*t: Tensor) -> Tensor:
        z, gain, shift, g_out, x, *norm_out, p_out = t
        unused = w.p_in, w.g_in
        again = TriangleMultiplicationWeights(gain, shift, *unused, *norm_out, p_out, g_out)
        return gated_update(z, x, again, residual, "torch")

    norm_in, norm_out = list(vars(w).values())[:2], (w.norm_out_weight, w.norm_out_bias)
    return recompute(fused, twin, z, *norm_in, w.g_out, x, *norm_out, w.p_out)


def _updates(
    z: Tensor, x: Tensor, w: TriangleMultiplicationWeights
) -> Iterator[tuple[tuple[int, int], Tensor]]:
    b, rows, cols, c = z.shape
    step = chunk_length(rows, b * cols * c * z.element_size() * 5, z.device)
    for lo, hi in spans(rows, step):
        o = x[:, :, lo:hi].permute(0, 2, 3, 1)
        o = F.layer_norm(o, o.shape[-1:], w.norm_out_weight, w.norm_out_bias, EPS)
        gate = F.linear(w.norm_in(z[:, lo:hi]), w.g_out).sigmoid_()
        yield (lo, hi), F.linear(o, w.p_out) * gate


def triangle_multiplication(
    z: Tensor,
    mask: Tensor | None,
    w: TriangleMultiplicationWeights,
    outgoing: bool,
    impl: str | None = None,
) -> Tensor:
    """Compute z + triangle multiplication of a whole pair tensor; in place without gradients.

    Args:
        z: [B, N, N, C].
        mask: [B, N, N], 1 = keep, None keeps all.
        w: weights.
        outgoing: Algorithm 12 (True) or 13 (False).
        impl: see `dispatch`.

    Returns:
        [B, N, N, C], `z` itself when gradients are off.

    Raises:
        ValueError: a shape or dtype that does not fit, or a named `impl` that cannot run.

    Source: AlphaFold 3 supplement, Algorithms 12 and 13.
    """
    check("triangle_multiplication", z, mask, *vars(w).values())
    if not z.numel():
        return nothing(z, *vars(w).values())
    if impl == "reference":
        from foldcp_kernels.triangle_multiplication import definition

        full = z.new_ones(z.shape[:3]) if mask is None else mask
        return definition.triangle_multiplication(z, full, w, outgoing)
    if impl == "cuequivariance":
        from foldcp_kernels.core import cuequivariance

        return cuequivariance.triangle_multiplication(z, mask, w, outgoing)
    if impl == "triton":  # all of it must run before any of it does
        choose_rows("triangle_multiplication", impl, z, "z", (z.shape[-1], w.p_in.shape[0] // 2))
    # Incoming contracts over rows: with transposed planes it is the same product.
    x, keep = (z, mask) if outgoing else (z.transpose(1, 2), swapped(mask))
    planes = project_planes(x, keep, w, impl=impl)
    d = planes.shape[1] // 2
    return gated_update(z, contract(None, planes[:, :d], planes[:, d:], True), w, impl=impl)
