"""Gather every op's definition in plain torch on whole tensors: the truth, in float64."""

from foldcp_kernels.adaptive_norm.definition import adaptive_norm, gated_residual
from foldcp_kernels.attention.definition import attention, attention_pair_bias
from foldcp_kernels.binned_heads.definition import expected_values
from foldcp_kernels.gated_output.definition import gated_output
from foldcp_kernels.norm_linear.definition import norm_linear_planes, norm_linear_rows
from foldcp_kernels.outer_product_mean.definition import outer_product_mean, outer_product_mean_tile
from foldcp_kernels.pair_weighted_averaging.definition import (
    pair_weighted_averaging,
    weighted_average,
)
from foldcp_kernels.relative_position.definition import relative_position
from foldcp_kernels.transition.definition import transition
from foldcp_kernels.triangle_attention.definition import triangle_attention
from foldcp_kernels.triangle_multiplication.definition import triangle_multiplication

__all__ = [
    "adaptive_norm",
    "attention",
    "attention_pair_bias",
    "expected_values",
    "gated_output",
    "gated_residual",
    "norm_linear_planes",
    "norm_linear_rows",
    "outer_product_mean",
    "outer_product_mean_tile",
    "pair_weighted_averaging",
    "relative_position",
    "transition",
    "triangle_attention",
    "triangle_multiplication",
    "weighted_average",
]
