"""Confidence heads on tiles: PAE, PDE and pLDDT as expectations, their logits only ever a chunk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foldcp.fabric.exchange.autograd import fetch
from foldcp.fabric.mesh import Mesh
from foldcp.layout.plans import token_plan
from foldcp.layout.tiles import PairLayout
from foldcp.modules.base import TiledModule, wide
from foldcp.modules.confidence.distogram import mirrored_rows
from foldcp.modules.confidence.scores import ColumnGroups
from foldcp.modules.hooks import MatrixSink
from foldcp.modules.trunk.whole import rows_at_root
from foldcp_kernels.binned_heads import bin_centres, expectations, expected_values, tm_values

Feats = Mapping[str, Tensor]
WriteRows = Callable[[int, Tensor], None]

MAX_ERROR = 32.0  # angstrom, upper end of the PAE and PDE bins
PDE_SUMS = 4  # weighted PDE and weight over all pairs, then over pairs of different chains


@dataclass(frozen=True)
class ConfidenceHeadsOptions:
    """Say which heads there are.

    Attributes:
        separate: pairs within a chain have a head of their own.
        atoms_per_token: atoms of a token that pLDDT is computed for; 0 rates tokens instead.
    """

    separate: bool
    atoms_per_token: int


class ConfidenceHeads(TiledModule):
    """The output heads of the confidence module. AlphaFold 3, Algorithm 31, lines 5 to 8.

    Args:
        twin: Boltz's ConfidenceHeads.
        mesh: the mesh.
        options: which heads there are.
    """

    def __init__(self, twin: nn.Module, mesh: Mesh, options: ConfidenceHeadsOptions) -> None:
        super().__init__(twin, mesh)
        self.options = options

    def expected(
        self, name: str, x: Tensor, values: Tensor, same: Tensor | None, other: Tensor | None = None
    ) -> Tensor:
        """Compute the expectations of one pair head for some rows.

        Args:
            name: "pae" or "pde".
            x: [rows, cols, C].
            values: of the bins [K, bins].
            same: bool [rows, cols], pairs of one chain; None when there is only one chain.
            other: the mirrored pairs, added to `x`.

        Returns:
            [K, rows, cols] in the dtype of `values`.
        """
        if not self.options.separate:
            weight = self._head(f"to_{name}_logits").weight
            return expected_values(x, weight, values, other=other)
        intra = self._head(f"to_{name}_intra_logits").weight
        inter = self._head(f"to_{name}_inter_logits").weight
        if same is None:
            return expected_values(x, intra, values, other=other)
        return expected_values(x, intra, values, other=other, weight_other=inter, same=same)

    def _head(self, name: str) -> nn.Linear:
        head = self.get_submodule(name)
        assert isinstance(head, nn.Linear)
        return head

    def _values(self, groups: ColumnGroups) -> tuple[Tensor, Tensor]:
        """Bin values of the PAE head [2, bins] (error, TM score) and of the PDE head [1, bins]."""
        mask, intra = groups.pad_mask, "_intra" if self.options.separate else ""
        out = []
        for name in ("pae", "pde"):
            bins = self._head(f"to_{name}{intra}_logits").out_features
            out.append(bin_centres(bins, MAX_ERROR, mask.device).to(mask.dtype))
        return torch.stack([out[0], tm_values(out[0], mask.sum())]), out[1][None]

    @torch.no_grad()
    def pair_errors(
        self,
        z: Tensor,
        contact_probability: Tensor,
        feats: Feats,
        groups: ColumnGroups,
        layout: PairLayout,
    ) -> tuple[Tensor, Tensor]:
        """Compute the expected errors of the tile and their sums over its columns.

        Args:
            z: pair tile [1, T_r, T_c, C].
            contact_probability: [1, T_r, T_c].
            feats: collated compact features.
            groups: column groups.
            layout: the tiling.

        Returns:
            errors [2, T_r, T_c] (PAE, PDE in angstrom; padding is undefined), and the sums
            [T_r, G + 4]: the expected TM score per group, then `PDE_SUMS`.

        Raises:
            ValueError: a tensor is not a tile of this layout.
        """
        self.mesh.check(z, layout)
        self.mesh.check(contact_probability, layout, "contact_probability")
        (r0, _), (c0, c1) = layout.tile_box()
        rows, cols = layout.valid(layout.row_span()), layout.valid((c0, c1))
        pae_values, pde_values = self._values(groups)
        members = groups.members((c0, c0 + cols))
        mask, asym = groups.pad_mask, F.pad(feats["asym_id"][0], (0, layout.padded - layout.n))
        errors = mask.new_empty((2, layout.tile_rows, layout.tile_cols))
        sums = mask.new_zeros((layout.tile_rows, len(groups.asym) + PDE_SUMS))
        token = torch.arange(layout.n, device=z.device)
        single = len(groups.chains) == 1
        bins = pae_values.shape[1] + pde_values.shape[1]
        bytes_each = 3 * layout.tile_cols * bins * z.element_size()
        for (lo, hi), other in mirrored_rows(z, layout, self.mesh, bytes_each):
            hi = min(hi, rows)
            if hi <= lo or cols == 0:
                continue
            mine, theirs = slice(r0 + lo, r0 + hi), slice(c0, c0 + cols)
            same = asym[mine, None] == asym[c0:c1]
            apart = None if single else same
            # Without the batch dimension the rows are contiguous: Linear makes one GEMM of them.
            x = z[0, lo:hi]
            pae, tm = self.expected("pae", x, pae_values, apart)[..., :cols]
            mirrored = other[0, : hi - lo]
            pde = self.expected("pde", x, pde_values, apart, mirrored)[0, :, :cols]
            errors[0, lo:hi, :cols], errors[1, lo:hi, :cols] = pae, pde
            weight = contact_probability[0, lo:hi, :cols] * mask[mine, None] * mask[theirs]
            weight.masked_fill_(token[mine, None] == token[theirs], 0)
            with torch.autocast(z.device.type, enabled=False):
                sums[lo:hi, :-PDE_SUMS] = tm @ members
            between = weight.masked_fill(same[:, :cols], 0)
            parts = (pde * weight, weight, pde * between, between)
            sums[lo:hi, -PDE_SUMS:] = torch.stack([p.sum(-1) for p in parts], -1)
        return errors, sums

    @torch.no_grad()
    def plddt(self, s: Tensor, feats: Feats, layout: PairLayout) -> Tensor:
        """Compute the expected pLDDT.

        Args:
            s: single shard [1, n, C_s].
            feats: collated compact features.
            layout: the tiling.

        Returns:
            [1, N], or [1, A] with atom-level confidence, between 0 and 1, on every rank.
        """
        logits = wide(self.to_plddt_logits(s))
        slots = self.options.atoms_per_token or 1
        logits = logits.unflatten(-1, (slots, -1))
        centres = bin_centres(logits.shape[-1], 1.0, s.device).to(logits.dtype)[None]
        # Stock pads atoms with zero logits; their expectation is the mean bin.
        blank = expectations(logits.new_zeros((1, logits.shape[-1])), centres)[0]
        plan = token_plan(layout, ("all",))
        shard = expectations(logits, centres)[0]
        (found,) = fetch(self.mesh, plan, (shard,), ((1,),), "confidence")
        found = found[:, : layout.n]
        if not self.options.atoms_per_token:
            return found[..., 0]
        real = feats["atom_pad_mask"][0].bool()
        atoms = torch.bincount(feats["atom_to_token"][0, real], minlength=layout.n)
        used = torch.arange(slots, device=s.device) < atoms[:, None]  # [N, slots]
        out = blank.expand(1, len(real)).clone()
        values = found[:, used]
        out[:, : values.shape[1]] = values
        return out


def gather_errors(errors: Tensor, write: WriteRows | None, layout: PairLayout, mesh: Mesh) -> None:
    """Bring tiles to the root, a row chunk at a time.

    Args:
        errors: this rank's tile [K, T_r, T_c].
        write: called on the root as `write(lo, values)`, with rows lo, lo + 1, ... [K, rows, N] in
            increasing order, on the mesh's device and valid until it returns; None elsewhere.
        layout: the tiling.
        mesh: the mesh.
    """
    for lo, rows in rows_at_root(errors, layout, mesh):
        if write is not None:
            write(lo, rows)


def to_memory(out: Tensor) -> WriteRows:
    """Return a function that writes rows of PAE and PDE to `out` [2, N, N]."""

    def write(lo: int, values: Tensor) -> None:
        out[:, lo : lo + values.shape[1]].copy_(values)

    return write


def to_sink(sink: MatrixSink, sample: int) -> WriteRows:
    """Return a function that hands rows of PAE and PDE to `sink`.

    Args:
        sink: takes the rows.
        sample: index of the sample.
    """

    def write(lo: int, values: Tensor) -> None:
        sink.rows("pae", sample, lo, values[0])
        sink.rows("pde", sample, lo, values[1])

    return write
