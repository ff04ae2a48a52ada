"""Boltz-1's confidence module on tiles: with a trunk of its own, or a pairformer stack alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foldcp.layout.tiles import WINDOW, AtomLayout, PairLayout
from foldcp.modules.atoms.encoder import AtomEncoderOptions
from foldcp.modules.atoms.windows import Feats
from foldcp.modules.boltz1.trunk import (
    InputEmbedder,
    MSAModule,
    PairformerModule,
    PairformerOptions,
)
from foldcp.modules.confidence.module import ConfidenceModule as SharedConfidenceModule
from foldcp.modules.confidence.module import Tokens
from foldcp.modules.confidence.options import ConfidenceOptions as SharedConfidenceOptions
from foldcp.modules.confidence.ratings import Ratings
from foldcp.modules.trunk.msa import MSAOptions
from foldcp_kernels.core.chunking import chunk_length, spans


@dataclass(frozen=True)
class TrunkOptions:
    """Say what the trunk of a confidence module reads.

    Attributes:
        atoms: what the atom features are.
        msa: what is read of the alignment.
    """

    atoms: AtomEncoderOptions
    msa: MSAOptions


@dataclass(frozen=True, kw_only=True)
class ConfidenceOptions(SharedConfidenceOptions):
    """Say more of Boltz-1's confidence module.

    Attributes:
        pairformer: of its pairformer stack.
        trunk: of its own trunk; None has a pairformer stack alone.
        reads_diffusion: it reads the token activations of the sampler.
    """

    pairformer: PairformerOptions
    trunk: TrunkOptions | None = None
    reads_diffusion: bool = False


class ConfidenceModule(SharedConfidenceModule):
    """pLDDT, PAE, PDE and the scores made of them. AlphaFold 3, Algorithm 31.

    Args:
        twin: Boltz-1's ConfidenceModule.
        mesh: the mesh.
        options: what it computes.
    """

    options: ConfidenceOptions

    def adopt(self, twin: nn.Module) -> None:
        """See `foldcp.modules.confidence.module.ConfidenceModule.adopt`."""
        mesh, trunk, blocks = self.mesh, self.options.trunk, self.options.pairformer
        self.imitate_trunk = trunk is not None
        self._s_diffusion: Tensor | None = None
        if trunk is None:
            self.pairformer_stack = PairformerModule(twin.pairformer_stack, mesh, blocks)
        else:
            self.input_embedder = InputEmbedder(twin.input_embedder, mesh, trunk.atoms)
            self.msa_module = MSAModule(twin.msa_module, mesh, trunk.msa)
            self.pairformer_module = PairformerModule(twin.pairformer_module, mesh, blocks)

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
        s_diffusion: Tensor | None = None,
        **options: Any,
    ) -> Ratings:
        """Rate M predicted structures, see `ConfidenceModule.forward` of Boltz-2.

        Args:
            s_inputs: shard of the input embedding [1, n, C_s].
            s: single shard [1, n, C_s].
            z: pair tile [1, T_r, T_c, C].
            x_pred: coordinates [M, A, 3] in angstrom, replicated.
            feats: collated compact features.
            contact_probability: [1, T_r, T_c].
            layout: the tiling.
            s_diffusion: token activations of the sampler, shard [M, n, 2 token_s], for a module
                that reads them.
            options: further arguments of Boltz-2's `forward`.

        Raises:
            ValueError: `s_diffusion` is missing, or a tensor is not a tile of this layout.
        """
        if self.options.reads_diffusion and s_diffusion is None:
            raise ValueError("`s_diffusion` is None; this module expects the sampler's tokens")
        if self.imitate_trunk:
            windows = feats["atom_pad_mask"].shape[1] // WINDOW
            atoms = AtomLayout(windows, layout.size, layout.rank)
            s_inputs = self.input_embedder(feats, layout, atoms)
        self._s_diffusion = s_diffusion
        try:
            return super().forward(
                s_inputs, s, z, x_pred, feats, contact_probability, layout, **options
            )
        finally:
            self._s_diffusion = None

    def singles(self, s_inputs: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """See `foldcp.modules.confidence.module.ConfidenceModule.singles`."""
        if not self.imitate_trunk:
            return super().singles(s_inputs, s)
        return s_inputs, self.s_init(s_inputs) + self.s_recycle(self.s_norm(s))

    def sides(self, s_inputs: Tensor) -> list[Tensor]:
        """See `foldcp.modules.confidence.module.ConfidenceModule.sides`."""
        row, col = super().sides(s_inputs)
        if self.imitate_trunk:
            row, col = row + self.z_init_1(s_inputs), col + self.z_init_2(s_inputs)
        return [row, col]

    def pair_rows(self, z: Tensor) -> Tensor:
        """See `foldcp.modules.confidence.module.ConfidenceModule.pair_rows`."""
        rows = super().pair_rows(z)
        return self.z_recycle(rows) if self.imitate_trunk else rows

    def refine(
        self, tokens: Tokens, tile: Tensor, sample: int, feats: Feats, layout: PairLayout
    ) -> tuple[Tensor, Tensor]:
        """See `foldcp.modules.confidence.module.ConfidenceModule.refine`."""
        s = tokens.s
        if self.options.reads_diffusion:
            found = self.s_diffusion_norm(self._s_diffusion[sample : sample + 1])
            s = s + self.s_diffusion_to_s(found)
        if not self.imitate_trunk:
            return self.pairformer_stack(s, tile, layout)
        z = self.msa_module(tile, tokens.inputs, feats, layout)
        s, z = self.pairformer_module(s, z, layout)
        each = 3 * z[:, :1].numel() * z.element_size()
        for lo, hi in spans(z.shape[1], chunk_length(z.shape[1], each, z.device)):
            z[:, lo:hi] = self.final_z_norm(z[:, lo:hi])
        return self.final_s_norm(s), z
