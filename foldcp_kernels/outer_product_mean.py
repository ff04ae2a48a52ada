"""Outer product mean of MSA projections, a chunk of rows at a time.

    out_ij = bias + (1 / max(1, n_ij)) sum_cd W[:, c, d] sum_s a_sic b_sjd,
    n_ij = sum_s mask_si mask_sj

Source: AlphaFold 3 supplement, Algorithm 9.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from foldcp_kernels.chunking import chunk_length, spans


def outer_product_chunks(
    a: Tensor, b: Tensor, count: Tensor, weight: Tensor, bias: Tensor, like: Tensor
) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """The outer product mean, row chunk by row chunk.

    Args:
        a: [B, S, T_r, D]. b: [B, S, T_c, D]. count: n_ij, [B, T_r, T_c].
        weight: [C, D * D]. bias: [C]. like: the pair tile (device and element size).

    Yields:
        ((start, stop), update [B, stop - start, T_c, C]).
    """
    _, s, rows, d = a.shape
    cols, channels = b.shape[2], weight.shape[0]
    w = weight.view(channels, d, d)
    # With few sequences it is cheaper to contract a with the weight first.
    few = s * d * channels < s * d * d + d * d * channels
    each = cols * (channels * 3 if few else 2 * d * d + channels) * a.element_size()
    for lo, hi in spans(rows, chunk_length(rows, a.shape[0] * each, a.device)):
        chunk = a[:, :, lo:hi]
        if few:
            left = torch.einsum("bsic,ocd->bisdo", chunk, w).flatten(2, 3)  # [B, r, S*D, C]
            right = b.transpose(1, 2).flatten(2)[:, None]  # [B, 1, T_c, S*D]
            out = right @ left
        else:
            left = chunk.permute(0, 2, 3, 1).flatten(1, 2)  # [B, r*D, S]
            right = b.flatten(2)  # [B, S, T_c*D]
            outer = (left @ right).unflatten(1, (hi - lo, d)).unflatten(3, (cols, d))
            outer = outer.transpose(2, 3).flatten(3)  # [B, r, T_c, D*D]
            out = outer @ weight.t().to(outer.dtype)
        norm = count[:, lo:hi, :, None].clamp(min=1)
        yield (lo, hi), out / norm.to(out.dtype) + bias.to(out.dtype)
