"""The local parts of triangle multiplication: planes in, contraction, gated output.

    a, b = mask * sigmoid(LN(z) Wg) * (LN(z) Wp)            planes, channel-major
    x_ij = sum_k a_ik b_jk   (outgoing)    or    sum_k a_ki b_kj   (incoming)
    z_ij += (LN(x_ij) Wo) * sigmoid(LN(z_ij) Wgo)

Source: AlphaFold 2 supplement, Algorithms 11 and 12; AlphaFold 3 supplement, Algorithms 12 and 13.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from foldcp_kernels.chunking import chunk_length, spans

EPS = 1e-5


@dataclass(frozen=True)
class TriangleMultiplicationWeights:
    """Weights of one triangle multiplication; C input channels, D hidden channels.

    norm_in_weight, norm_in_bias [C]; p_in, g_in [2D, C]; norm_out_weight, norm_out_bias [D];
    p_out [C, D]; g_out [C, C].
    """

    norm_in_weight: Tensor
    norm_in_bias: Tensor
    p_in: Tensor
    g_in: Tensor
    norm_out_weight: Tensor
    norm_out_bias: Tensor
    p_out: Tensor
    g_out: Tensor

    def norm_in(self, x: Tensor) -> Tensor:
        """LayerNorm of the input channels."""
        return F.layer_norm(x, x.shape[-1:], self.norm_in_weight, self.norm_in_bias, EPS)


def project_planes(
    z: Tensor,
    mask: Tensor | None,
    w: TriangleMultiplicationWeights,
    channels: tuple[int, int] | None = None,
) -> Tensor:
    """The planes a and b of a tile.

    Args:
        z: pair tile [B, T_r, T_c, C]. mask: 1 = keep, [B, T_r, T_c], None keeps all.
        w: weights. channels: which of the D hidden channels (start, stop), None for all.

    Returns:
        [B, 2d, T_r, T_c]: a in the first d channels, b in the last d.
    """
    b, rows, cols, _ = z.shape
    half = w.p_in.shape[0] // 2
    lo, hi = channels or (0, half)
    p_in, g_in = (
        m if hi - lo == half else torch.cat((m[lo:hi], m[half + lo : half + hi]))
        for m in (w.p_in, w.g_in)
    )
    width = 2 * (hi - lo)
    step = chunk_length(rows, b * cols * z.element_size() * 3 * width, z.device)
    planes, parts = None, []
    for lo, hi in spans(rows, step):
        x = w.norm_in(z[:, lo:hi])
        p = F.linear(x, p_in) * F.linear(x, g_in).sigmoid_()
        if mask is not None:
            p = p * mask[:, lo:hi, :, None].to(p.dtype)
        p = p.permute(0, 3, 1, 2)
        if torch.is_grad_enabled():
            parts.append(p)
            continue
        if planes is None:
            planes = p.new_empty((b, width, rows, cols))
        planes[:, :, lo:hi] = p
    return torch.cat(parts, 2) if parts else planes


def contract(acc: Tensor | None, a: Tensor, b: Tensor, outgoing: bool) -> Tensor:
    """Add one panel's contribution to the contraction.

    Args:
        acc: [B, d, T_r, T_c] so far, None at the first panel; changed in place without gradients.
        a: [B, d, T_r, K] (outgoing) or [B, d, K, T_r] (incoming). b: likewise with T_c.
        outgoing: which of the two updates.

    Returns:
        [B, d, T_r, T_c].
    """
    a, b = (a, b.transpose(-1, -2)) if outgoing else (a.transpose(-1, -2), b)
    if acc is None:
        return a @ b
    if torch.is_grad_enabled():
        return acc + a @ b
    if acc.dtype == a.dtype and acc.dtype in (torch.float32, torch.float64):
        acc.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))
        return acc
    # Low precision: panels add up in float32.
    acc = acc if acc.dtype == torch.float32 else acc.float()
    return acc.add_(a @ b)


def gated_update(
    z: Tensor, x: Sequence[Tensor], w: TriangleMultiplicationWeights
) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """The update of z, row chunk by row chunk.

    Args:
        z: pair tile [B, T_r, T_c, C]; a chunk is read before its update is handed out.
        x: the contraction, in channel chunks [B, d, T_r, T_c]. w: weights.

    Yields:
        ((start, stop), update [B, stop - start, T_c, C]).
    """
    b, rows, cols, c = z.shape
    step = chunk_length(rows, b * cols * c * z.element_size() * 5, z.device)
    for lo, hi in spans(rows, step):
        o = [p[:, :, lo:hi] for p in x]
        o = (o[0] if len(o) == 1 else torch.cat(o, 1)).permute(0, 2, 3, 1)
        o = F.layer_norm(o, o.shape[-1:], w.norm_out_weight, w.norm_out_bias, EPS)
        gate = F.linear(w.norm_in(z[:, lo:hi]), w.g_out).sigmoid_()
        yield (lo, hi), F.linear(o, w.p_out) * gate
