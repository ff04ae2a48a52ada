"""Hold the weights of a pair weighted averaging, and apply each of its linear layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foldcp_kernels.gated_output import gated_output
from foldcp_kernels.norm_linear import norm_linear_planes, norm_linear_rows

MASKED = 1e6  # what Boltz takes from the logit of a masked pair


@dataclass(frozen=True)
class PairWeightedAveragingWeights:
    """Weights with H heads of D channels.

    norm_m_weight, norm_m_bias [C_m]; norm_z_weight, norm_z_bias [C_z]; m, g [H * D, C_m];
    z [H, C_z]; o [C_m, H * D].
    """

    norm_m_weight: Tensor
    norm_m_bias: Tensor
    norm_z_weight: Tensor
    norm_z_bias: Tensor
    m: Tensor
    g: Tensor
    z: Tensor
    o: Tensor
    heads: int

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the weights in order."""
        return tuple(vars(self).values())[:-1]

    def logits(self, z: Tensor, impl: str | None = None) -> Tensor:
        """Project a tile to weight logits: [B, T_r, T_c, C_z] -> [B, H, T_r, T_c].

        Args:
            z: pair tile [B, T_r, T_c, C_z].
            impl: see `dispatch`.
        """
        return norm_linear_planes(z, self.norm_z_weight, self.norm_z_bias, self.z, impl=impl)

    def values(self, m: Tensor, impl: str | None = None) -> Tensor:
        """Project some sequences to values: [B, S, N, C_m] -> [B, S, N, H, D].

        Args:
            m: MSA [B, S, N, C_m].
            impl: see `dispatch`.
        """
        v = norm_linear_rows(m, self.norm_m_weight, self.norm_m_bias, self.m, impl)
        return v.unflatten(-1, (self.heads, -1))

    def output(self, m: Tensor, o: Tensor, impl: str | None = None) -> Tensor:
        """Add the gated update to m; in place when gradients are off.

        Args:
            m: MSA [B, S, N, C_m].
            o: averages [B, S, N, H * D].
            impl: see `dispatch`.
        """
        return gated_output(m, self.norm_m_weight, self.norm_m_bias, self.g, o, self.o, impl)
