"""The parameters of Boltz's triangle modules, as the ops on tiles take them."""

from __future__ import annotations

from foldcp.modules.base import TiledModule
from foldcp_kernels.triangle_attention import TriangleAttentionWeights
from foldcp_kernels.triangle_multiplication import TriangleMultiplicationWeights


class TriangleMultiplication(TiledModule):
    """Triangle multiplication, outgoing or incoming. AlphaFold 3, Algorithms 12 and 13."""

    def weights(self) -> TriangleMultiplicationWeights:
        """Return the parameters in the order of the op."""
        return TriangleMultiplicationWeights(
            self.norm_in.weight,
            self.norm_in.bias,
            self.p_in.weight,
            self.g_in.weight,
            self.norm_out.weight,
            self.norm_out.bias,
            self.p_out.weight,
            self.g_out.weight,
        )


class TriangleAttention(TiledModule):
    """Triangle attention, starting or ending node. AlphaFold 3, Algorithms 14 and 15."""

    def weights(self) -> TriangleAttentionWeights:
        """Return the parameters in the order of the op."""
        return TriangleAttentionWeights(
            self.layer_norm.weight,
            self.layer_norm.bias,
            self.linear.weight,
            self.mha.linear_q.weight,
            self.mha.linear_k.weight,
            self.mha.linear_v.weight,
            self.mha.linear_g.weight,
            self.mha.linear_o.weight,
            self.linear.weight.shape[0],
        )
