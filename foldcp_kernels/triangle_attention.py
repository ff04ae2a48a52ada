"""The local parts of triangle attention: projections of a chunk of lines, attention, output.

For a line i (a row for the starting node, a column for the ending node):
    o_ij = sum_k softmax_k(q_ij . k_ik / sqrt(D) + b_jk + 1e9 (mask_ik - 1)) v_ik
    z_ij += (sigmoid(LN(z_ij) Wg) * o_ij) Wo

Source: AlphaFold 2 supplement, Algorithms 13 and 14; AlphaFold 3 supplement, Algorithms 14 and 15.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from foldcp_kernels.attention import Carry, attend, merge
from foldcp_kernels.chunking import chunk_length, spans

EPS = 1e-5
MASKED = 1e9  # what Boltz subtracts from the logit of a masked key


@dataclass(frozen=True)
class TriangleAttentionWeights:
    """Weights of one triangle attention with H heads of D channels.

    norm_weight, norm_bias [C]; bias [H, C]; q, k, v, g [H * D, C]; o [C, H * D].
    """

    norm_weight: Tensor
    norm_bias: Tensor
    bias: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    o: Tensor
    heads: int

    def norm(self, x: Tensor) -> Tensor:
        """LayerNorm of the channels."""
        return F.layer_norm(x, x.shape[-1:], self.norm_weight, self.norm_bias, EPS)


def project_bias(z: Tensor, w: TriangleAttentionWeights) -> Tensor:
    """The triangle bias of a tile: [B, T_r, T_c, C] -> [B, T_r, T_c, H]."""
    b, rows, cols, c = z.shape
    step = chunk_length(rows, b * cols * c * z.element_size() * 2, z.device)
    parts = [F.linear(w.norm(z[:, lo:hi]), w.bias) for lo, hi in spans(rows, step)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def project_lines(
    x: Tensor, mask: Tensor | None, w: TriangleAttentionWeights
) -> tuple[Tensor, Tensor]:
    """Queries, and the keys and values that travel.

    Args:
        x: normalised lines [B, I, J, C]. mask: [B, I, J], 1 = keep, None keeps all.
        w: weights.

    Returns:
        q [B, I, J, H, D]; kv [B, I, J, 2HD (+ 1 for the mask's logit)].
    """
    q = F.linear(x, w.q).unflatten(-1, (w.heads, -1))
    kv = [F.linear(x, w.k), F.linear(x, w.v)]
    if mask is not None:
        kv.append(((mask[..., None] - 1) * MASKED).to(kv[0].dtype))
    return q, torch.cat(kv, -1)


def attend_panel(q: Tensor, kv: Tensor, bias: Tensor, masked: bool, carry: Carry | None) -> Carry:
    """Attend all positions of the lines to one panel of keys.

    Args:
        q: [B, I, J, H, D]. kv: [B, I, K, 2HD (+ 1)]. bias: [B, H, J, K].
        masked: kv carries the mask's logit in its last channel.
        carry: (o [B, I, H, J, D], lse [B, I, H, J]) so far, None at the first panel.

    Returns:
        The new carry.
    """
    b, i, j, h, d = q.shape
    hd = h * d
    k = kv[..., :hd].unflatten(-1, (h, d)).transpose(2, 3)
    v = kv[..., hd : 2 * hd].unflatten(-1, (h, d)).transpose(2, 3)
    parts = []
    for n in range(b):
        logits = bias[n : n + 1]
        if masked:
            logits = logits + kv[n, :, None, None, :, 2 * hd]
        parts.append(attend(q[n].transpose(1, 2), k[n], v[n], logits, d**-0.5))
    o, lse = (torch.stack(x) if b > 1 else x[0][None] for x in zip(*parts, strict=True))
    return merge(carry, (o, lse))


def gated_output(x: Tensor, o: Tensor, w: TriangleAttentionWeights) -> Tensor:
    """The update of the lines.

    Args:
        x: normalised lines [B, I, J, C]. o: attention output [B, I, H, J, D]. w: weights.

    Returns:
        [B, I, J, C].
    """
    gate = F.linear(x, w.g).sigmoid_()
    o = o.transpose(2, 3).flatten(-2).to(gate.dtype)
    return F.linear(gate * o, w.o)
