"""The confidence module on tiles: one sample after the other, its pair tile built in row chunks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foldcp.fabric.exchange.autograd import fetch
from foldcp.fabric.memory import rows_on
from foldcp.fabric.mesh import Mesh
from foldcp.layout.plans import token_plan
from foldcp.layout.tiles import PairLayout
from foldcp.modules.base import TiledModule, wide
from foldcp.modules.confidence.heads import (
    PDE_SUMS,
    ConfidenceHeads,
    gather_errors,
    to_memory,
    to_sink,
)
from foldcp.modules.confidence.options import ConfidenceOptions
from foldcp.modules.confidence.ratings import Ratings, joined
from foldcp.modules.confidence.scores import (
    CONTACT,
    EPS,
    NONPOLYMER,
    ColumnGroups,
    Ligand,
    atom_interface,
    distances,
    frame_mask,
    interface_plddt,
    ligands,
    row_totals,
    tm_scores,
)
from foldcp.modules.hooks import MatrixSink
from foldcp.modules.trunk.pair_embedding import (
    PairEmbedding,
    RelativePositionEncoder,
)
from foldcp.modules.trunk.pairformer import PairformerModule
from foldcp_kernels.core.chunking import chunk_length, spans
from foldcp_kernels.relative_position import add_rows_of_table_

Feats = Mapping[str, Tensor]


@dataclass(frozen=True)
class Tokens:
    """Tensors that all samples share: the normalised single shard and its projections.

    `inputs` is the shard that they are projections of. `rows` and `cols` are terms of the pair
    tile [1, T, C]; `left` and `right` factors, or None.
    """

    s: Tensor
    inputs: Tensor
    rows: Tensor
    cols: Tensor
    left: Tensor | None
    right: Tensor | None


class ConfidenceModule(TiledModule):
    """pLDDT, PAE, PDE and the scores made of them. AlphaFold 3, Algorithm 31.

    Args:
        twin: Boltz's ConfidenceModule.
        mesh: the mesh.
        options: what it computes.
    """

    def __init__(self, twin: nn.Module, mesh: Mesh, options: ConfidenceOptions) -> None:
        super().__init__(twin, mesh)
        self.options = options
        self.confidence_heads = ConfidenceHeads(twin.confidence_heads, mesh, options.heads)
        self.pair_embedding: PairEmbedding | None = None
        if options.relative_position is not None:
            self.pair_embedding = PairEmbedding(
                RelativePositionEncoder(twin.rel_pos, mesh, options.relative_position),
                twin.token_bonds,
                twin.token_bonds_type if options.bond_types else None,
                None if options.contacts is None else twin.contact_conditioning,
                options.contacts,
            )
        self.adopt(twin)

    def adopt(self, twin: nn.Module) -> None:
        """Put the stacks on tiles in the place of the twin's."""
        self.pairformer_stack = PairformerModule(twin.pairformer_stack, self.mesh)

    @torch.no_grad()
    def forward(
        self,
        s_inputs: Tensor,
        s: Tensor,
        z: Tensor,
        x_pred: Tensor,
        feats: Feats,
        contact_probability: Tensor,
        layout: PairLayout,
        reuse_z: bool = False,
        sink: MatrixSink | None = None,
    ) -> Ratings:
        """Rate M predicted structures, without gradient.

        Args:
            s_inputs: shard of the input embedding [1, n, C_s].
            s: single shard [1, n, C_s].
            z: pair tile [1, T_r, T_c, C], on the mesh's device or the host.
            x_pred: coordinates [M, A, 3] in angstrom, replicated.
            feats: collated compact features.
            contact_probability: [1, T_r, T_c], from the distogram.
            layout: the tiling.
            reuse_z: the last sample may overwrite `z` on the mesh's device, which saves a tile.
            sink: takes the rows of "pae" and "pde" on the root rank; None keeps the matrices.

        Returns:
            The ratings on every rank, their matrices only on the root rank and without `sink`.

        Raises:
            ValueError: a tensor is not a tile of this layout.

        Source: AlphaFold 3 supplement, Algorithm 31.
        """
        self.mesh.check(z, layout, parked=True)
        tokens = self._tokens(s_inputs, s, layout)
        samples, n, dtype = len(x_pred), layout.n, wide(z[:1, :1, :1]).dtype
        groups, chains = ColumnGroups.of(feats, dtype), ligands(feats)
        keeps = self.mesh.is_root and sink is None
        matrices = torch.empty((2, samples, n, n), dtype=dtype) if keeps else None
        found, spare = [], None
        for m in range(samples):
            spare, tile = self._tile(z, spare, reuse_z and m + 1 == samples)
            near = self._build(tile, z, tokens, x_pred[m], feats, layout)
            s_m, tile = self.refine(tokens, tile, m, feats, layout)
            errors, sums = self.confidence_heads.pair_errors(
                tile, contact_probability, feats, groups, layout
            )
            write = to_memory(matrices[:, m]) if matrices is not None else None
            write = write if sink is None else to_sink(sink, m)
            gather_errors(errors, write, layout, self.mesh)
            totals = row_totals(torch.cat([sums, near[:, None].to(sums)], 1), layout, self.mesh)
            found.append(self._scores(s_m, x_pred[m], totals, feats, groups, chains, layout))
        pae, pde = (None, None) if matrices is None else matrices
        return replace(joined(found), pae=pae, pde=pde)

    def _tile(
        self, z: Tensor, spare: Tensor | None, in_place: bool
    ) -> tuple[Tensor | None, Tensor]:
        """(what the next sample may overwrite, the tile of this sample)."""
        if in_place and z.device.type == self.mesh.device.type:
            return None, z
        tile = torch.empty_like(z, device=self.mesh.device) if spare is None else spare
        return tile, tile

    def refine(
        self, tokens: Tokens, tile: Tensor, sample: int, feats: Feats, layout: PairLayout
    ) -> tuple[Tensor, Tensor]:
        """Run the stack on one sample: (single shard, pair tile), the tile in place.

        Args:
            tokens: what all samples share.
            tile: pair tile of the sample [1, T_r, T_c, C], changed in place.
            sample: its index.
            feats: collated compact features.
            layout: the tiling.
        """
        return self.pairformer_stack(tokens.s, tile, layout)

    def singles(self, s_inputs: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shards (input embedding, single) that the module works with.

        Args:
            s_inputs: shard of the input embedding [1, n, C_s].
            s: single shard [1, n, C_s].
        """
        s_inputs = self.s_inputs_norm(s_inputs)
        if self.options.norms_single:
            s = self.s_norm(s)
        if self.options.adds_inputs:
            s = s + self.s_input_to_s(s_inputs)
        return s_inputs, s

    def sides(self, s_inputs: Tensor) -> list[Tensor]:
        """Return the shards that a pair adds from its row and from its column."""
        return [self.s_to_z(s_inputs), self.s_to_z_transpose(s_inputs)]

    def pair_rows(self, z: Tensor) -> Tensor:
        """Transform rows of the pair tile before anything is added."""
        return wide(self.z_norm(z))

    def _tokens(self, s_inputs: Tensor, s: Tensor, layout: PairLayout) -> Tokens:
        s_inputs, s = self.singles(s_inputs, s)
        shards = self.sides(s_inputs)
        if self.options.adds_product:
            shards += [self.s_to_z_prod_in1(s_inputs), self.s_to_z_prod_in2(s_inputs)]
        plan = token_plan(layout, ("rows", "cols") * (len(shards) // 2))
        got = fetch(self.mesh, plan, tuple(shards), ((1,),) * len(shards), "confidence")
        return Tokens(s, s_inputs, *got, *(None,) * (4 - len(got)))

    def _build(
        self, out: Tensor, z: Tensor, tokens: Tokens, x: Tensor, feats: Feats, layout: PairLayout
    ) -> Tensor:
        """Write the pair tile of one sample to `out` (which may be `z`).

        Returns:
            [T_r], 1 where a token is within 8 angstrom of another chain in this rank's columns.
        """
        n, (r0, r1), (c0, c1) = layout.n, *layout.tile_box()
        pad = (0, layout.padded - n)
        x = F.pad(wide(x[feats["token_to_rep_atom"][0]]), (0, 0, *pad))
        asym = F.pad(feats["asym_id"][0], pad)
        table, boundaries = self.dist_bin_pairwise_embed.weight, self.boundaries
        real = layout.valid((c0, c1))
        near = x.new_zeros(r1 - r0)
        each = 5 * layout.tile_cols * z.shape[-1] * wide(z[:1, :1, :1]).element_size()
        for lo, hi in spans(r1 - r0, chunk_length(r1 - r0, each, out.device)):
            rows = self.pair_rows(rows_on(out.device, z, lo, hi))
            rows.add_(tokens.rows[:, lo:hi, None]).add_(tokens.cols[:, None])
            if tokens.left is not None:
                product = tokens.left[:, lo:hi, None] * tokens.right[:, None]
                rows.add_(self.s_to_z_prod_out(product))
            if self.pair_embedding is not None:
                self.pair_embedding.add_rows_(rows, feats, layout, lo, hi)
            d = distances(x[r0 + lo : r0 + hi], x[c0:c1], n)
            # Left insertion counts the boundaries that the distance exceeds.
            bins = torch.bucketize(d, boundaries.to(d.dtype), out_int32=True)
            add_rows_of_table_(rows[0], table, bins)
            out[:, lo:hi] = rows
            other = asym[r0 + lo : r0 + hi, None] != asym[c0 : c0 + real]
            near[lo:hi] = ((d[:, :real] < CONTACT) & other).any(-1)
        return near

    def _scores(
        self,
        s: Tensor,
        x: Tensor,
        totals: Tensor,
        feats: Feats,
        groups: ColumnGroups,
        chains: list[Ligand],
        layout: PairLayout,
    ) -> Ratings:
        """The O(N) results of one sample, [1, ...] each; `totals` [Q, N, G + PDE_SUMS + 1]."""
        sums = totals[..., :-1].sum(0)
        weighted, weight, between, between_weight = sums[:, -PDE_SUMS:].sum(0).unbind()
        plddt = self.confidence_heads.plddt(s, feats, layout)
        if not self.confidence_heads.options.atoms_per_token:
            mask, ligand = groups.pad_mask, feats["mol_type"][0] == NONPOLYMER
            interface = totals[..., -1].amax(0) > 0
        else:
            mask = feats["atom_pad_mask"][0].to(groups.pad_mask)
            # Stock gives padding atoms chain 0 and type 0, and lets them be contacts.
            token, real = feats["atom_to_token"][0], mask.bool()
            ligand = (feats["mol_type"][0, token] == NONPOLYMER) & real
            interface = atom_interface(
                wide(x), feats["asym_id"][0, token] * real, layout, self.mesh
            )
        complex_plddt, complex_iplddt = interface_plddt(
            plddt[0], mask, ligand, interface, self.options.interface
        )
        frames = frame_mask(x, feats, chains).to(sums)
        return Ratings(
            plddt=plddt,
            complex_plddt=complex_plddt,
            complex_iplddt=complex_iplddt,
            complex_pde=(weighted / weight)[None],
            complex_ipde=(between / (between_weight + EPS))[None],
            tm=tm_scores(sums[:, :-PDE_SUMS], groups, frames),
        )
