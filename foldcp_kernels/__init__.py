"""Single-device ops of foldcp: torch implementations, float64 references, Triton kernels.

The ops by name, each with its definition in its docstring; `foldcp_kernels.core.definitions` has
the same in float64. `using` and `set_impl` choose what runs them. A package that is called like its
op is reached by `from foldcp_kernels.NAME import ...`.
"""

from foldcp_kernels.adaptive_norm import adaptive_norm, gated_residual
from foldcp_kernels.attention import attend, attend_panel
from foldcp_kernels.binned_heads import expected_values
from foldcp_kernels.core.dispatch import default_impl, set_impl, using
from foldcp_kernels.gated_output import gated_output
from foldcp_kernels.norm_linear import norm_linear_planes, norm_linear_rows
from foldcp_kernels.outer_product_mean import outer_product_mean
from foldcp_kernels.pair_weighted_averaging import pair_weighted_averaging
from foldcp_kernels.relative_position import add_relative_position, relative_position
from foldcp_kernels.transition import transition
from foldcp_kernels.triangle_attention import triangle_attention
from foldcp_kernels.triangle_multiplication import triangle_multiplication

__all__ = [
    "adaptive_norm",
    "add_relative_position",
    "attend",
    "attend_panel",
    "default_impl",
    "expected_values",
    "gated_output",
    "gated_residual",
    "norm_linear_planes",
    "norm_linear_rows",
    "outer_product_mean",
    "pair_weighted_averaging",
    "relative_position",
    "set_impl",
    "transition",
    "triangle_attention",
    "triangle_multiplication",
    "using",
]


def __dir__() -> list[str]:
    return sorted(__all__)
