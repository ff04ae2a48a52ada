"""Template modules on tiles: pair features from per-token data, one template at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foldcp.fabric.mesh import Mesh
from foldcp.layout.tiles import PairLayout, Span
from foldcp.modules.base import TiledModule, draw_pair_dropout
from foldcp.modules.confidence.scores import distances
from foldcp.modules.trunk.pairformer import PairformerNoSeqModule
from foldcp_kernels.core.chunking import chunk_length, spans
from foldcp_kernels.relative_position import add_rows_of_table_

Feats = Mapping[str, Tensor]

_FLOATS = 5  # features of a pair that are not an index: masks of C-beta and frame, direction


@dataclass(frozen=True)
class _Side:
    """Template data of the tokens along one side of a tile, [T, ...] each; coordinates in angstrom.

    `group` says which tokens see each other; `kind` is the residue type.
    """

    cb: Tensor
    ca: Tensor
    cb_mask: Tensor
    frame_mask: Tensor
    rotation: Tensor
    origin: Tensor
    group: Tensor
    kind: Tensor


@dataclass(frozen=True)
class TemplateOptions:
    """Say which distances between C-beta atoms a template module tells apart.

    Attributes:
        shortest: upper end of the first bin, angstrom.
        longest: lower end of the last bin, angstrom.
        bins: number of bins.
    """

    shortest: float
    longest: float
    bins: int


class TemplateV2Module(TiledModule):
    """Structures of related chains as pair features. AlphaFold 3, Algorithm 16.

    Args:
        twin: Boltz's TemplateV2Module.
        mesh: the mesh.
        options: which distances count as different.
    """

    def __init__(self, twin: nn.Module, mesh: Mesh, options: TemplateOptions) -> None:
        super().__init__(twin, mesh)
        self.options = options
        self.pairformer = PairformerNoSeqModule(twin.pairformer, mesh)

    def groups(self, feats: Feats, template: int) -> Tensor:
        """Return the visibility group of each token [N]; pairs across groups get no geometry.

        Args:
            feats: collated compact features.
            template: its index.
        """
        return feats["visibility_ids"][0, template]

    @torch.no_grad()
    def forward(self, z: Tensor, feats: Feats, layout: PairLayout) -> Tensor:
        """Add the template update to a pair tile, without gradient.

        Args:
            z: pair tile [1, T_r, T_c, C], changed in place.
            feats: collated compact features.
            layout: the tiling.

        Returns:
            `z`. Without any template the update is exactly zero and nothing is computed.

        Raises:
            ValueError: `z` is not a tile of this layout.

        Source: AlphaFold 3 supplement, Algorithm 16.
        """
        self.mesh.check(z, layout)
        present = feats["template_mask"][0].any(-1).tolist()
        shown = [t for t, some in enumerate(present) if some]
        if shown:
            # Templates run one by one to save memory; the generator moves on as if all ran at once.
            devices = [z.device] if z.device.type == "cuda" else []
            with torch.random.fork_rng(devices):
                self._add(z, feats, layout, shown)
        for _ in self.pairformer.layers:
            draw_pair_dropout(len(present), layout.n, z.device)
        return z

    def _add(self, z: Tensor, feats: Feats, layout: PairLayout, shown: list[int]) -> None:
        total = None
        for t in shown:
            sides = [self._side(feats, t, layout, s) for s in layout.tile_box()]
            v = None
            for (lo, hi), rows in self._inputs(z, sides, layout):
                v = rows.new_empty((*z.shape[:3], rows.shape[-1])) if v is None else v
                v[:, lo:hi] = rows
            v = self.pairformer(v, layout)
            # The input of the stack is added once more; computing it again spares a copy of it.
            for (lo, hi), rows in self._inputs(z, sides, layout):
                u = self.v_norm(v[:, lo:hi].add_(rows))
                if t != shown[-1]:
                    v[:, lo:hi] = u if total is None else u.add_(total[:, lo:hi])
                    continue
                if total is not None:
                    u = (u + total[:, lo:hi]) / len(shown)
                z[:, lo:hi].add_(self.u_proj(self.relu(u)))
            total = v

    def _side(self, feats: Feats, t: int, layout: PairLayout, span: Span) -> _Side:
        def cut(x: Tensor) -> Tensor:
            pad = (0, 0) * (x.ndim - 1) + (0, layout.padded - layout.n)
            return F.pad(x, pad)[span[0] : span[1]]

        names = ("cb", "ca", "mask_cb", "mask_frame", "frame_rot", "frame_t")
        data = [cut(feats[f"template_{name}"][0, t]) for name in names]
        return _Side(*data, cut(self.groups(feats, t)), cut(feats["template_restype"][0, t]))

    def _inputs(
        self, z: Tensor, sides: list[_Side], layout: PairLayout
    ) -> Iterator[tuple[Span, Tensor]]:
        """The stack's input for one template, row chunk by row chunk, [1, rows, T_c, D]."""
        _, rows_total, cols_total, channels = z.shape
        weight = self.a_proj.weight.T  # [features, D]
        table = F.pad(weight[: self.options.bins], (0, 0, 0, 1))  # the last row: not visible
        bins = self.options.bins
        floats = weight[bins : bins + _FLOATS]
        first, second = weight[bins + _FLOATS :].chunk(2)
        row_term, col_term = first[sides[0].kind], second[sides[1].kind]  # [T_r, D], [T_c, D]
        each = cols_total * (2 * channels + 3 * weight.shape[1]) * weight.element_size()
        for lo, hi in spans(rows_total, chunk_length(rows_total, each, z.device)):
            with torch.autocast(z.device.type, enabled=False):
                bins, geometry = self._geometry(sides, lo, hi, layout.n)
                a = geometry @ floats
                add_rows_of_table_(a, table, bins)
                a.add_(row_term[lo:hi, None]).add_(col_term)
            yield (lo, hi), a.add_(self.z_proj(self.z_norm(z[:, lo:hi]))[0])[None]

    def _geometry(self, sides: list[_Side], lo: int, hi: int, n: int) -> tuple[Tensor, Tensor]:
        """Distance bins [rows, T_c] (`bins` where not visible) and the 5 floats of a pair."""
        rows, cols = sides
        visible = rows.group[lo:hi, None] == cols.group
        d = distances(rows.cb[lo:hi], cols.cb, n)
        o = self.options
        edges = torch.linspace(o.shortest, o.longest, o.bins - 1, device=d.device)
        bins = torch.bucketize(d, edges.to(d.dtype), out_int32=True)
        bins.masked_fill_(~visible, o.bins)
        # Each row's C-alpha in the frame of each column's token. Boltz's weights were trained with
        # every component divided by its own length, so only the signs count.
        away = rows.ca[lo:hi, None] - cols.origin
        vector = torch.einsum("ija,jab->ijb", away, cols.rotation).sign_()
        masks = [
            (mine[lo:hi, None] * theirs)[..., None]
            for mine, theirs in (
                (rows.cb_mask, cols.cb_mask),
                (rows.frame_mask, cols.frame_mask),
            )
        ]
        geometry = torch.cat([masks[0], vector, masks[1]], -1)
        return bins, geometry.mul_(visible[..., None])


class TemplateModule(TemplateV2Module):
    """The template module whose geometry stays within a chain."""

    def groups(self, feats: Feats, template: int) -> Tensor:
        """Return the chain of each token [N].

        Args:
            feats: collated compact features.
            template: its index.
        """
        return feats["asym_id"][0]
