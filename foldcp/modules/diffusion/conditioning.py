"""Everything that the diffusion sampler takes from the trunk, computed once per structure.

The conditioned pair is never stored: row chunks of it become the attention biases of all token
layers in one GEMM, and the few channels that the atom windows read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foldcp.fabric.memory import rows_on
from foldcp.fabric.mesh import Mesh
from foldcp.layout.tiles import AtomLayout, PairLayout
from foldcp.modules.atoms.encoder import AtomEncoder, AtomEncoderOptions, folded
from foldcp.modules.atoms.windows import Feats, atom_shard
from foldcp.modules.base import TiledModule, wide
from foldcp.modules.trunk.transition import transition_weights
from foldcp_kernels.core.chunking import chunk_length, spans
from foldcp_kernels.core.dispatch import compute_dtype
from foldcp_kernels.norm_linear import norm_linear_planes, norm_linear_rows
from foldcp_kernels.norm_linear.planes import padded_planes
from foldcp_kernels.transition import transition

MASKED = -1e6  # bias of masked tokens, as in Boltz


@dataclass(frozen=True)
class Conditioning:
    """Constant over samples and steps.

    Args:
        q: atom activations of the buffer [1, a, atom_s].
        c: atom conditioning of the buffer [1, a, atom_s].
        atom_enc_bias: [L, W, H, 32, 128], key mask included.
        atom_dec_bias: [L, W, H, 32, 128], key mask included.
        token_bias: [L, H, T_r, T_c], token mask included; each layer contiguous.
    """

    q: Tensor
    c: Tensor
    atom_enc_bias: Tensor
    atom_dec_bias: Tensor
    token_bias: Tensor


class DiffusionConditioning(TiledModule):
    """Biases and atom conditioning from the trunk's tiles and shards.

    Args:
        twin: Boltz-2's DiffusionConditioning.
        mesh: the mesh.
        options: what the features of its atoms are; None where its encoder is on tiles already.
    """

    def __init__(self, twin: nn.Module, mesh: Mesh, options: AtomEncoderOptions | None) -> None:
        super().__init__(twin, mesh)
        if options is not None:
            self.atom_encoder = AtomEncoder(twin.atom_encoder, mesh, options)

    @torch.no_grad()
    def forward(
        self,
        s_trunk: Tensor,
        z_trunk: Tensor,
        relpos_rows: Callable[[int, int], Tensor],
        feats: Feats,
        layout: PairLayout,
        atom_layout: AtomLayout,
    ) -> Conditioning:
        """Condition the sampler on the trunk (inference only).

        Args:
            s_trunk: this rank's shard [1, n, token_s].
            z_trunk: this rank's tile [1, T_r, T_c, token_z], on the mesh's device or the host.
            relpos_rows: `(lo, hi) -> [1, hi - lo, T_c, token_z]`, the relative position encoding of
                tile rows lo:hi.
            feats: collated compact features.
            layout: the tiling.
            atom_layout: the shards of windows.

        Returns:
            The conditioning of this rank's atoms and tile.

        Raises:
            ValueError: a tile or layout does not fit.

        Source: AlphaFold 3 supplement, Algorithms 5, 20 and 21.
        """
        self.mesh.check(z_trunk, layout, "z_trunk", parked=True)
        depth = max(len(self.atom_enc_proj_z), len(self.atom_dec_proj_z))
        shard = atom_shard(feats, layout, atom_layout, self.mesh, depth)
        token_bias, z_to_p = self._pair(z_trunk, relpos_rows, feats, layout)
        with torch.autocast(self.mesh.device.type, enabled=False):
            q = self.atom_encoder.embed(feats, shard)
            c = self.atom_encoder.add_single(q, s_trunk, shard)
        projections = [*self.atom_enc_proj_z, *self.atom_dec_proj_z]
        bias = self.atom_encoder.biases(feats, shard, c, projections, z_to_p)
        encoder, decoder = bias.split([len(self.atom_enc_proj_z), len(self.atom_dec_proj_z)])
        return Conditioning(q, c, encoder, decoder, token_bias)

    def _pair(
        self,
        z: Tensor,
        relpos_rows: Callable[[int, int], Tensor],
        feats: Feats,
        layout: PairLayout,
    ) -> tuple[Tensor, Tensor]:
        """(biases of all token layers [L, H, T_r, T_c], z_to_p [T_r, T_c, atom_z])."""
        weight, bias = folded(self.token_trans_proj_z)
        atom_weight, atom_bias = folded([self.atom_encoder.z_to_p_trans])
        rows, cols, channels = z.shape[1:]
        device = self.mesh.device
        heads = weight.shape[0]
        penalty = _key_penalty(feats, layout)
        each = cols * (12 * channels + 2 * heads) * z.element_size()
        out: Tensor | None = None
        dtype = wide(z[:1, :1, :1]).dtype
        z_to_p = torch.empty((rows, cols, atom_weight.shape[0]), dtype=dtype, device=device)
        for lo, hi in spans(rows, chunk_length(rows, each, device)):
            x = self._conditioned(rows_on(device, z, lo, hi), relpos_rows(lo, hi))
            with torch.autocast(device.type, enabled=False):
                z_to_p[lo:hi] = norm_linear_rows(wide(x), None, None, atom_weight)[0] + atom_bias
            if out is None:
                out = padded_planes(z, heads, compute_dtype(x), device)
            norm_linear_planes(x, None, None, weight, bias, out=out[:, :, lo:hi])
            if penalty is not None:
                out[:, :, lo:hi] += penalty
        assert out is not None
        return out[0].unflatten(0, (len(self.token_trans_proj_z), -1)), z_to_p

    def _conditioned(self, z: Tensor, relpos: Tensor) -> Tensor:
        """The conditioned pair of a few rows [1, r, T_c, C]."""
        conditioner = self.pairwise_conditioner
        x = conditioner.dim_pairwise_init_proj(torch.cat([z, relpos], -1))
        for module in conditioner.transitions:
            x = transition(x, transition_weights(module))
        return x


def _key_penalty(feats: Feats, layout: PairLayout) -> Tensor | None:
    """Additive mask of this tile's columns [T_c]; None when all tokens are real, as usual."""
    mask = feats["token_pad_mask"][0]
    if bool(mask.all()):
        return None
    lo, hi = layout.col_span()
    return (1 - F.pad(mask, (0, layout.padded - layout.n))[lo:hi]) * MASKED
