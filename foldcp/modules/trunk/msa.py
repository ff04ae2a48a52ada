"""The MSA module on token shards and pair tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foldcp.fabric.memory import on_host, rows_on
from foldcp.fabric.mesh import Mesh
from foldcp.layout.tiles import PairLayout, Span
from foldcp.modules.base import Block, TiledModule, draw_dropout
from foldcp.modules.from_root import drawn
from foldcp.modules.graphs.block_graph import run_blocks
from foldcp.modules.trunk.masks import stack_masks
from foldcp.modules.trunk.pairformer import PairformerNoSeqLayer
from foldcp.modules.trunk.stack import Progress
from foldcp.modules.trunk.transition import Transition
from foldcp.planner.choice import lean
from foldcp.rings.outer_product_mean import outer_product_mean
from foldcp.rings.pair_weighted_averaging import column_weights, pair_weighted_averaging
from foldcp_kernels.core.chunking import chunk_length, map_chunks, spans
from foldcp_kernels.core.recompute import nothing
from foldcp_kernels.pair_weighted_averaging import PairWeightedAveragingWeights
from foldcp_kernels.pair_weighted_averaging import parts as local

Features = dict[str, Tensor]


class PairWeightedAveraging(TiledModule):
    """AlphaFold 3, Algorithm 10, with the residual."""

    def weights(self) -> PairWeightedAveragingWeights:
        """Return the parameters in the order of the op."""
        return PairWeightedAveragingWeights(
            self.norm_m.weight,
            self.norm_m.bias,
            self.norm_z.weight,
            self.norm_z.bias,
            self.proj_m.weight,
            self.proj_g.weight,
            self.proj_z.weight,
            self.proj_o.weight,
            self.proj_z.weight.shape[0],
        )

    def forward(
        self, m: Tensor, z: Tensor, layout: PairLayout, mask: Tensor | None = None
    ) -> Tensor:
        """Return m + update.

        Args:
            m: MSA shard [B, S, n, C_m].
            z: pair tile.
            layout: the tiling.
            mask: pairs that count [1 or B, T_r, T_c], 1 = keep; None keeps all real tokens.

        Returns:
            The updated shard, in place when gradients are off.

        Raises:
            ValueError: `z` is not this rank's tile, or a shape or dtype does not fit it.
        """
        w = self.weights()
        self.mesh.check(z, layout)
        mask = None if mask is None else mask.expand(len(z), -1, -1)
        self.mesh.fits(
            "pair_weighted_averaging tile", m, z, mask, *w.tensors(), H=w.heads, N=layout.shard
        )
        if not m.numel():
            return nothing(m, z, *w.tensors())
        parts = local.chosen(m, z, w)
        weights = column_weights(local.logits(z, w, parts), layout, self.mesh, mask)
        width = w.tensors()[4].shape[0]
        each = m.shape[0] * (2 * layout.tile_cols + 3 * layout.tile_rows) * width * 4
        # Every chunk costs two exchanges, so a mesh takes larger ones.
        step = chunk_length(m.shape[1], each, m.device, at_most=8 if layout.size > 1 else 0)

        def change(chunk: Tensor, _: Span) -> Tensor:
            v = local.values(chunk, w, parts)
            o = pair_weighted_averaging(v, weights, layout, self.mesh)
            return local.output(chunk, o.flatten(-2), w, parts)

        return map_chunks(m, 1, step, change)


class OuterProductMean(TiledModule):
    """AlphaFold 3, Algorithm 9, with the residual on z."""

    def forward(self, z: Tensor, m: Tensor, mask: Tensor, layout: PairLayout) -> Tensor:
        """Return z + OuterProductMean(m).

        Args:
            z: pair tile.
            m: MSA shard [B, S, n, C_m].
            mask: [B, S, n], 0 on padding.
            layout: the tiling.

        Returns:
            The updated tile, in place when gradients are off.
        """
        x = self.norm(m)
        keep = mask[..., None].to(x.dtype)
        a, b = self.proj_a(x) * keep, self.proj_b(x) * keep
        return outer_product_mean(
            z, a, b, mask, self.proj_o.weight, self.proj_o.bias, layout, self.mesh
        )


def draw_row_dropout(m: Tensor) -> None:
    """Draw the dropout mask of one block's update of the MSA."""
    draw_dropout((m.shape[0], m.shape[1], 1, 1), m.device)


def msa_operations(z: Tensor, m: Tensor) -> float:
    """Count the operations of a block's outer product mean and weighted averaging, roughly.

    Args:
        z: pair tile [B, T_r, T_c, C].
        m: MSA shard [B, S, n, C_m].
    """
    return 2560.0 * m.shape[1] * z.shape[:3].numel()


class MSALayer(TiledModule, Block):
    """One block of the MSA module."""

    in_place = (True, True)

    def __init__(self, twin: nn.Module, mesh: Mesh) -> None:
        super().__init__(twin, mesh)
        self.pair_weighted_averaging = PairWeightedAveraging(twin.pair_weighted_averaging, mesh)
        self.msa_transition = Transition(twin.msa_transition, mesh)
        self.outer_product_mean = OuterProductMean(twin.outer_product_mean, mesh)
        self.pairformer_layer = PairformerNoSeqLayer(twin.pairformer_layer, mesh)

    def draw(self, z: Tensor, m: Tensor, layout: PairLayout) -> None:
        """See `Block`."""
        draw_row_dropout(m)
        self.pairformer_layer.draw(z, layout)

    def operations(self, *state: Tensor) -> float:
        """See `Block`."""
        z, m = state
        return msa_operations(z, m) + self.pairformer_layer.operations(z)

    def compute(
        self,
        z: Tensor,
        m: Tensor,
        mask: Tensor,
        keys: Tensor | None,
        msa_mask: Tensor,
        layout: PairLayout,
    ) -> tuple[Tensor, Tensor]:
        """Run one block.

        Args:
            z: pair tile.
            m: MSA shard [B, S, n, C_m].
            mask: see `stack_masks`.
            keys: see `stack_masks`.
            msa_mask: [B, S, n], 0 on padding.
            layout: the tiling.

        Returns:
            (z, m) updated; both in place when gradients are off.
        """
        m = self.pair_weighted_averaging(m, z, layout, keys)
        m = self.msa_transition(m)
        z = self.outer_product_mean(z, m, msa_mask, layout)
        return *self.pairformer_layer.compute(z, mask, keys, layout), m


@dataclass(frozen=True)
class MSAOptions:
    """Say what an MSA module reads of the alignment.

    Attributes:
        paired: it knows which rows are paired.
        most_rows: so many rows are drawn at random; None takes all.
    """

    paired: bool
    most_rows: int | None


class MSAModule(TiledModule):
    """The MSA module of blocks of class `layer`; `forward` returns stock's z + MSAModule(z).

    Args:
        twin: Boltz's MSAModule.
        mesh: the mesh.
        options: what it reads.
    """

    layer: type[Block] = MSALayer

    def __init__(self, twin: nn.Module, mesh: Mesh, options: MSAOptions) -> None:
        super().__init__(twin, mesh)
        self.options = options
        self.layers = nn.ModuleList(self.layer(x, mesh) for x in twin.layers)

    def forward(
        self,
        z: Tensor,
        s_inputs: Tensor,
        feats: Features,
        layout: PairLayout,
        progress: Progress | None = None,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        """Return z + z', z' the pair tile after the MSA blocks (stock adds the output to z).

        Args:
            z: pair tile, kept; in lean memory the result takes its place.
            s_inputs: input embedding shard [B, n, C_s].
            feats: compact features.
            layout: the tiling.
            progress: (blocks done, in all).
            token_mask: see `stack_masks`.

        Returns:
            The pair tile, a new one unless memory is lean.
        """
        m, msa_mask = self.embed(s_inputs, feats, layout)
        masks = (*stack_masks(layout, self.mesh, token_mask)[:2], msa_mask)
        grad = torch.is_grad_enabled()
        before = on_host(z) if lean(layout, self.mesh) and not grad else None
        start = z.clone() if before is None else z
        out, _ = run_blocks(self.layers, (start, m), masks, layout, progress)
        if before is None:
            return out + z if grad else out.add_(z)
        each = out[:, :1].numel() * out.element_size()
        for lo, hi in spans(out.shape[1], chunk_length(out.shape[1], each, out.device)):
            out[:, lo:hi].add_(rows_on(out.device, before, lo, hi))
        return out

    def embed(self, s_inputs: Tensor, feats: Features, layout: PairLayout) -> tuple[Tensor, Tensor]:
        """Embed the MSA: its shard [B, S, n, C_m] and its mask [B, S, n], 0 on padding.

        Args:
            s_inputs: shard of the input embedding [B, n, C_s].
            feats: compact features.
            layout: the tiling.
        """
        lo, hi = layout.shard_span()
        real = layout.valid((lo, hi))
        keys = ("msa", "has_deletion", "deletion_value", "msa_paired", "msa_mask")
        msa, has, value, paired, mask = (feats[k] for k in keys)
        if self.options.most_rows is not None:
            order = torch.empty(msa.shape[1], dtype=torch.long, device=msa.device)
            order = drawn(self.mesh, lambda: torch.randperm(len(order)).to(order.device), order)
            rows = order[: self.options.most_rows]
            msa, has, value, paired, mask = (x[:, rows] for x in (msa, has, value, paired, mask))
        msa, has, value, paired, mask = (
            F.pad(x[:, :, lo : lo + real], (0, hi - lo - real))
            for x in (msa, has, value, paired, mask)
        )
        # One-hot times weight is a look-up of the weight's columns.
        w = self.msa_proj.weight
        extra = [has, value, *([paired] if self.options.paired else [])]
        tokens = w.shape[1] - len(extra)
        m = F.embedding(msa.long(), w[:, :tokens].t())
        for i, x in enumerate(extra):
            m = m + x.to(m.dtype)[..., None] * w[:, tokens + i]
        m = m + self.s_proj(s_inputs)[:, None].to(m.dtype)
        return m, mask.to(m.dtype)
