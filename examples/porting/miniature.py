"""The pairformer stack of Protenix in plain torch, small: its layers, and its parameter names.

This is "the other architecture" of pairformer_on_a_mesh.py, written from AlphaFold 3's supplement
with the keys that `state_dict` of Protenix 2.0 has. Look at: what differs from Boltz. Projections
of triangle multiplication come as a and b apart, channels and heads are free, the norm of the
single is inside its attention, which reads every token, whatever the pair mask says.
"""

import math

import torch
from torch import Tensor, nn

MASKED = 1e9  # what a masked pair's logit loses in triangle attention


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A Linear without bias."""
    return nn.Linear(inputs, outputs, bias=False)


class TriangleMultiplication(nn.Module):
    """Algorithms 12 (outgoing) and 13 (incoming) of AlphaFold 3."""

    def __init__(self, channels: int, hidden: int, outgoing: bool) -> None:
        super().__init__()
        self.outgoing = outgoing
        self.layer_norm_in, self.layer_norm_out = nn.LayerNorm(channels), nn.LayerNorm(hidden)
        self.linear_a_p, self.linear_a_g = linear(channels, hidden), linear(channels, hidden)
        self.linear_b_p, self.linear_b_g = linear(channels, hidden), linear(channels, hidden)
        self.linear_g, self.linear_z = linear(channels, channels), linear(hidden, channels)

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        """The update of z [N, N, C]; mask [N, N]."""
        x, keep = self.layer_norm_in(z), mask[..., None]
        a = keep * self.linear_a_p(x) * self.linear_a_g(x).sigmoid()
        b = keep * self.linear_b_p(x) * self.linear_b_g(x).sigmoid()
        product = torch.einsum("ikd,jkd->ijd" if self.outgoing else "kid,kjd->ijd", a, b)
        return self.linear_z(self.layer_norm_out(product)) * self.linear_g(x).sigmoid()


class GatedAttention(nn.Module):
    """Projections of an attention whose output is gated by its queries' input."""

    def __init__(self, channels: int, width: int, heads: int, query_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.linear_q = nn.Linear(channels, heads * width, bias=query_bias)
        self.linear_k, self.linear_v = (linear(channels, heads * width) for _ in "kv")
        self.linear_g, self.linear_o = (
            linear(channels, heads * width),
            linear(heads * width, channels),
        )

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Attend within the lines of x [..., N, C]; bias is added to logits [..., H, N, N]."""
        q, k, v, g = (
            project(x).unflatten(-1, (self.heads, -1))
            for project in (self.linear_q, self.linear_k, self.linear_v, self.linear_g)
        )
        logits = torch.einsum("...ihd,...jhd->...hij", q / math.sqrt(q.shape[-1]), k) + bias
        out = torch.einsum("...hij,...jhd->...ihd", logits.softmax(-1), v)
        return self.linear_o((g.sigmoid() * out).flatten(-2))


class TriangleAttention(nn.Module):
    """Algorithm 14 of AlphaFold 3; Algorithm 15 is the same on the transposed pair tensor."""

    def __init__(self, channels: int, width: int, heads: int) -> None:
        super().__init__()
        self.layer_norm, self.linear = nn.LayerNorm(channels), linear(channels, heads)
        self.mha = GatedAttention(channels, width, heads, query_bias=False)

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        """The update of z [N, N, C]; mask [N, N]."""
        x = self.layer_norm(z)
        bias = self.linear(x).permute(2, 0, 1)  # [H, N, N]
        return self.mha(x, bias + MASKED * (mask - 1)[:, None, None])


class AttentionPairBias(nn.Module):
    """Algorithm 24 of AlphaFold 3 without conditioning: attention of the single track."""

    def __init__(self, channels: int, pair: int, heads: int) -> None:
        super().__init__()
        self.layernorm_a, self.layernorm_z = nn.LayerNorm(channels), nn.LayerNorm(pair)
        self.linear_nobias_z = linear(pair, heads)
        self.attention = GatedAttention(channels, channels // heads, heads, query_bias=True)

    def forward(self, s: Tensor, z: Tensor) -> Tensor:
        """The update of s [N, C_s]."""
        bias = self.linear_nobias_z(self.layernorm_z(z)).permute(2, 0, 1)
        return self.attention(self.layernorm_a(s), bias)


class Transition(nn.Module):
    """Algorithm 11 of AlphaFold 3."""

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__()
        self.layernorm1 = nn.LayerNorm(channels)
        self.linear_no_bias_a = linear(channels, factor * channels)
        self.linear_no_bias_b = linear(channels, factor * channels)
        self.linear_no_bias = linear(factor * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """The update of x [..., C]."""
        x = self.layernorm1(x)
        swish = nn.functional.silu(self.linear_no_bias_a(x))
        return self.linear_no_bias(swish * self.linear_no_bias_b(x))


class PairformerBlock(nn.Module):
    """Algorithm 17 of AlphaFold 3, one block."""

    def __init__(
        self, c_s: int, c_z: int, heads: int, hidden: int, width: int, pair_heads: int, factor: int
    ) -> None:
        super().__init__()
        self.tri_mul_out = TriangleMultiplication(c_z, hidden, outgoing=True)
        self.tri_mul_in = TriangleMultiplication(c_z, hidden, outgoing=False)
        self.tri_att_start = TriangleAttention(c_z, width, pair_heads)
        self.tri_att_end = TriangleAttention(c_z, width, pair_heads)
        self.pair_transition = Transition(c_z, factor)
        self.attention_pair_bias = AttentionPairBias(c_s, c_z, heads)
        self.single_transition = Transition(c_s, 4)

    def forward(self, s: Tensor, z: Tensor, pair_mask: Tensor) -> tuple[Tensor, Tensor]:
        """(s, z) updated."""
        z = z + self.tri_mul_out(z, pair_mask)
        z = z + self.tri_mul_in(z, pair_mask)
        z = z + self.tri_att_start(z, pair_mask)
        z = z + self.tri_att_end(z.transpose(0, 1), pair_mask.T).transpose(0, 1)
        z = z + self.pair_transition(z)
        s = s + self.attention_pair_bias(s, z)
        return s + self.single_transition(s), z


class PairformerStack(nn.Module):
    """Algorithm 17 of AlphaFold 3.

    Args:
        blocks: number of blocks.
        c_s: channels of the single.
        c_z: channels of a pair.
        heads: of the single's attention, c_s / heads channels each.
        hidden: channels of the triangle multiplications.
        width: channels of a head of the triangle attentions.
        pair_heads: heads of the triangle attentions.
        factor: hidden channels of a pair's transition, in c_z.
    """

    def __init__(
        self,
        blocks: int,
        c_s: int,
        c_z: int,
        heads: int,
        hidden: int = 128,
        width: int = 32,
        pair_heads: int = 4,
        factor: int = 4,
    ) -> None:
        super().__init__()
        sizes = c_s, c_z, heads, hidden, width, pair_heads, factor
        self.blocks = nn.ModuleList(PairformerBlock(*sizes) for _ in range(blocks))

    def forward(self, s: Tensor, z: Tensor, pair_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Run the blocks.

        Args:
            s: [N, C_s].
            z: [N, N, C_z].
            pair_mask: [N, N], 1 = keep.

        Returns:
            (s, z) updated.
        """
        for block in self.blocks:
            s, z = block(s, z, pair_mask)
        return s, z
