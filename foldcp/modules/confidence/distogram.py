"""The distogram of a tile, reduced to the contact probability row chunk by row chunk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foldcp.fabric.exchange.autograd import stream
from foldcp.fabric.mesh import Mesh
from foldcp.layout.cuts import chunks
from foldcp.layout.plans import transpose_plan
from foldcp.layout.tiles import PairLayout, Span
from foldcp.modules.base import TiledModule, wide
from foldcp_kernels.binned_heads import expected_values
from foldcp_kernels.core.chunking import chunk_length

CONTACT_BINS = 20  # bins that count as a contact: the first 20 of 64 between 2 and 22 angstrom


def mirrored_rows(
    z: Tensor, layout: PairLayout, mesh: Mesh, bytes_each: int
) -> Iterator[tuple[Span, Tensor]]:
    """Yield z^T row chunk by row chunk, from its owners.

    Args:
        z: pair tile [B, T_r, T_c, C]; it must not change meanwhile.
        layout: the tiling.
        mesh: the mesh.
        bytes_each: transient bytes that the caller needs for one row.

    Returns:
        An iterator over ((lo, hi), [B, hi - lo, T_c, C]), a transposed view of what was received.
    """
    # On a mesh two received chunks and a packed one to send are alive as well.
    rows = 3 if layout.size == 1 else 6
    each = rows * z[:, :1].numel() * z.element_size() + bytes_each
    length = chunk_length(layout.tile_rows, each, z.device)
    pieces = -(-layout.tile_rows // length)
    plan = transpose_plan(layout, pieces)
    mirrored = stream(mesh, plan, (z,), ((1, 2),), "transpose")
    for (lo, hi), (other,) in zip(chunks(layout.tile_rows, pieces), mirrored, strict=True):
        yield (lo, hi), other.transpose(1, 2)


@dataclass(frozen=True)
class DistogramOptions:
    """Say how many bins a distogram has; the Linear may have those of several."""

    bins: int


class DistogramModule(TiledModule):
    """Distances of token pairs in bins. AlphaFold 3 supplement, section 4.4.

    Args:
        twin: Boltz's DistogramModule.
        mesh: the mesh.
        options: its bins.
    """

    def __init__(self, twin: nn.Module, mesh: Mesh, options: DistogramOptions) -> None:
        super().__init__(twin, mesh)
        self.options = options

    def logits_rows(self, z: Tensor, layout: PairLayout) -> Iterator[tuple[Span, Tensor]]:
        """Yield the logits of the first distogram, row chunk by row chunk.

        Args:
            z: pair tile [B, T_r, T_c, C].
            layout: the tiling.

        Returns:
            An iterator over ((lo, hi), [B, hi - lo, T_c, bins]).

        Raises:
            ValueError: `z` is not a tile of this layout.
        """
        self.mesh.check(z, layout)
        weight = self.distogram.weight[: self.options.bins]
        bias = self.distogram.bias[: self.options.bins]
        for (lo, hi), other in mirrored_rows(z, layout, self.mesh, self._bytes_each(z, layout)):
            yield (lo, hi), F.linear(z[:, lo:hi] + other, weight, bias)

    @torch.no_grad()
    def contact_probability(self, z: Tensor, layout: PairLayout) -> Tensor:
        """Compute the probability that two tokens touch (the 20 nearest distance bins).

        Args:
            z: pair tile [B, T_r, T_c, C].
            layout: the tiling.

        Returns:
            [B, T_r, T_c] in float32 (float64 for float64 logits).

        Raises:
            ValueError: `z` is not a tile of this layout.

        Source: AlphaFold 3 supplement, section 4.4.
        """
        self.mesh.check(z, layout)
        weight = self.distogram.weight[: self.options.bins]
        bias = self.distogram.bias[: self.options.bins]
        out = torch.empty(z.shape[:3], dtype=wide(z[:0]).dtype, device=z.device)
        near = out.new_zeros((1, self.options.bins))
        near[:, :CONTACT_BINS] = 1
        for (lo, hi), other in mirrored_rows(z, layout, self.mesh, self._bytes_each(z, layout)):
            out[:, lo:hi] = expected_values(z[:, lo:hi], weight, near, bias, other)[0]
        return out

    def _bytes_each(self, z: Tensor, layout: PairLayout) -> int:
        """Bytes of the logits of one row and of what is computed from them."""
        return 2 * z.shape[0] * layout.tile_cols * self.options.bins * z.element_size()
