"""Define the relative position embedding in plain torch: the truth, run it in float64."""

from __future__ import annotations

from torch import Tensor

from foldcp_kernels.relative_position.positions import Positions, table_index


def relative_position(table: Tensor, p: Positions) -> Tensor:
    """Look up the table row of each pair.

    Args:
        table: [rows of the table, C].
        p: positions of the pairs.

    Returns:
        The encoding [R, T, C].

    Source: AlphaFold 3, Algorithm 3.
    """
    return table[table_index(p).long()]
