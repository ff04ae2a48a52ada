"""Triangle multiplication and attention modules on tiles."""

from __future__ import annotations

from torch import Tensor, nn

from foldcp.fabric.mesh import Mesh
from foldcp.layout.tiles import PairLayout
from foldcp.modules.base import TiledModule
from foldcp.rings.triangle_attention import triangle_attention
from foldcp.rings.triangle_multiplication import triangle_multiplication
from foldcp_kernels.triangle_attention import TriangleAttentionWeights
from foldcp_kernels.triangle_multiplication import TriangleMultiplicationWeights


class TriangleMultiplication(TiledModule):
    """Triangle multiplication with the residual.

    Args:
        twin: Boltz's TriangleMultiplicationOutgoing or ...Incoming.
        mesh: the mesh.
        outgoing: which of the two it is.
    """

    def __init__(self, twin: nn.Module, mesh: Mesh, outgoing: bool) -> None:
        super().__init__(twin, mesh)
        self.outgoing = outgoing

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

    def forward(self, z: Tensor, layout: PairLayout, mask: Tensor) -> Tensor:
        """Return z + update.

        Args:
            z: pair tile [B, T_r, T_c, C].
            layout: the tiling.
            mask: [B, T_r, T_c], 1 = keep, 0 on padding.

        Returns:
            The updated tile, in place when gradients are off.
        """
        return triangle_multiplication(z, mask, self.weights(), self.outgoing, layout, self.mesh)


class TriangleMultiplicationOutgoing(TriangleMultiplication):
    """AlphaFold 3, Algorithm 12."""

    def __init__(self, twin: nn.Module, mesh: Mesh) -> None:
        super().__init__(twin, mesh, outgoing=True)


class TriangleMultiplicationIncoming(TriangleMultiplication):
    """AlphaFold 3, Algorithm 13."""

    def __init__(self, twin: nn.Module, mesh: Mesh) -> None:
        super().__init__(twin, mesh, outgoing=False)


class TriangleAttention(TiledModule):
    """Triangle attention with the residual.

    Args:
        twin: Boltz's TriangleAttentionStartingNode or ...EndingNode.
        mesh: the mesh.
        starting: which of the two it is.
    """

    def __init__(self, twin: nn.Module, mesh: Mesh, starting: bool) -> None:
        super().__init__(twin, mesh)
        self.starting = starting
        self.heads = twin.no_heads

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
            self.heads,
        )

    def forward(self, z: Tensor, layout: PairLayout, mask: Tensor | None = None) -> Tensor:
        """Return z + update.

        Args:
            z: pair tile [B, T_r, T_c, C].
            layout: the tiling.
            mask: keys [B, T_r, T_c], 1 = keep; a number between takes 1e9 (1 - mask) from the
                logit, as in Boltz; None keeps every real token.

        Returns:
            The updated tile, in place when gradients are off.
        """
        return triangle_attention(z, mask, self.weights(), self.starting, layout, self.mesh)


class TriangleAttentionStartingNode(TriangleAttention):
    """AlphaFold 3, Algorithm 14."""

    def __init__(self, twin: nn.Module, mesh: Mesh) -> None:
        super().__init__(twin, mesh, starting=True)


class TriangleAttentionEndingNode(TriangleAttention):
    """AlphaFold 3, Algorithm 15."""

    def __init__(self, twin: nn.Module, mesh: Mesh) -> None:
        super().__init__(twin, mesh, starting=False)
