"""The atom encoder: embeddings of atoms and the attention bias of every window.

One-hot features of stock Boltz are looked up in the columns of its Linear; the atom-pair
embedding exists for a few windows at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foldcp.fabric.exchange.autograd import fetch
from foldcp.fabric.mesh import Mesh
from foldcp.layout.schedule import boxes_plan
from foldcp.layout.tiles import KEYS, WINDOW, Span
from foldcp.modules.atoms.windows import SIDE, AtomShard, Feats, key_windows, query_windows
from foldcp.modules.base import TiledModule, wide
from foldcp_kernels.core.chunking import chunk_length, spans

MASKED = -1e6  # bias of masked keys, as in Boltz

_ELEMENTS, _CHARS, _NAME = 128, 64, 4
_RES_TYPES, _MOL_TYPES = 33, 4
_MAX_WINDOWS = 32  # of a chunk: bounds the token box when every atom is a token of its own


def folded(projections: Sequence[nn.Sequential]) -> tuple[Tensor, Tensor]:
    """Fold several (LayerNorm, bias-free Linear) of one input into one Linear of its normed form.

    Args:
        projections: each maps [..., C] to [..., H]; a rearrangement may follow the Linear.

    Returns:
        weight [L * H, C] and bias [L * H], to be used on `F.layer_norm(x, (C,))`.
    """
    # Folded at full precision; the Linear that uses them rounds as autocast says.
    with torch.autocast(projections[0][1].weight.device.type, enabled=False):
        weight = torch.cat([linear.weight * norm.weight for norm, linear, *_ in projections])
        bias = torch.cat([linear.weight @ norm.bias for norm, linear, *_ in projections])
    return weight, bias


@dataclass(frozen=True)
class AtomEncoderOptions:
    """Say what the Linear of the atom features reads besides position, charge and element.

    Attributes:
        mask: the padding mask.
        names: the four characters of the atom's name.
        backbone: whether it is an atom of the backbone, and which.
        residues: type of its residue, whether it is modified, and type of its molecule.
    """

    mask: bool
    names: bool
    backbone: bool
    residues: bool


class AtomEncoder(TiledModule):
    """Embeddings of this rank's atoms and attention biases of its windows.

    Args:
        twin: Boltz's AtomEncoder, or Boltz-1's AtomAttentionEncoder.
        mesh: the mesh.
        options: what the atom features are.

    Source: AlphaFold 3 supplement, Algorithm 5.
    """

    def __init__(self, twin: nn.Module, mesh: Mesh, options: AtomEncoderOptions) -> None:
        super().__init__(twin, mesh)
        self.options = options

    def embed(self, feats: Feats, shard: AtomShard) -> Tensor:
        """Apply the Linear of the atom features by table look-up.

        Args:
            feats: collated compact features.
            shard: this rank's windows.

        Returns:
            [1, a, atom_s] in the dtype of the weights; a padding atom has no class at all.
        """
        linear, options = self.embed_atom_features, self.options
        w = linear.weight
        pos, charge = (shard.cut(feats[k]).to(w.dtype) for k in ("ref_pos", "ref_charge"))
        known = torch.zeros(1, *shard.mask.shape, w.shape[0], dtype=w.dtype, device=w.device)
        at = 5 if options.mask else 4

        def look_up(index: Tensor, classes: int) -> None:
            nonlocal at
            known.add_(F.embedding(index, w[:, at : at + classes].T))
            at += classes

        look_up(shard.cut(feats["ref_element"]), _ELEMENTS)
        if options.names:
            for chars in shard.cut(feats["ref_atom_name_chars"]).unbind(-1):
                look_up(chars, _CHARS)
        residue = (_RES_TYPES + 1 + _MOL_TYPES) if options.residues else 0
        if options.backbone:
            look_up(shard.cut(feats["atom_backbone_feat"]), w.shape[1] - at - residue)
        if residue:
            token = shard.token + shard.tokens[0]
            look_up(feats["res_type"][:, token], _RES_TYPES)
            known.add_(feats["modified"][:, token, None].to(w.dtype) * w[:, at])
            at += 1
            look_up(feats["mol_type"][:, token], _MOL_TYPES)
        assert at == w.shape[1], "columns of embed_atom_features left over"
        if options.mask:
            known.add_(w[:, 4])
        known.mul_(shard.mask[:, None])
        return known.add_(F.linear(pos, w[:, :3], linear.bias)).add_(charge[..., None] * w[:, 3])

    def add_single(self, c: Tensor, s_trunk: Tensor, shard: AtomShard) -> Tensor:
        """Add the projected single of each atom's token [1, n, token_s] to c [1, a, atom_s].

        Args:
            c: atom activations of the buffer [1, a, atom_s].
            s_trunk: single shard [1, n, token_s].
            shard: this rank's atoms.
        """
        return c + shard.from_tokens(self.s_to_c_trans(wide(s_trunk)))

    def biases(
        self,
        feats: Feats,
        shard: AtomShard,
        c: Tensor,
        projections: Sequence[nn.Sequential],
        z_to_p: Tensor | None = None,
    ) -> Tensor:
        """Compute attention biases of the windows from the atom-pair embedding, key mask included.

        Args:
            feats: collated compact features.
            shard: this rank's windows.
            c: atom conditioning [1, a, atom_s].
            projections: (LayerNorm, Linear) from atom_z to heads, one per output.
            z_to_p: this rank's tile of the projected pair [T_r, T_c, atom_z], None without one.

        Returns:
            [L, W, H, 32, 128] for L projections to H heads, in the dtype of the Linear (bfloat16
            under autocast).
        """
        # Pieces of p that depend on one atom only; zero padding commutes with a bias-free Linear.
        with torch.autocast(c.device.type, enabled=False):
            of_query, of_key = self.c_to_p_trans_q(c), self.c_to_p_trans_k(c)
        weight, bias = folded(projections)
        atom_z = weight.shape[1]
        longest = max(hi - lo for lo, hi in shard.buffers) // WINDOW
        each = 6 * WINDOW * KEYS * atom_z * c.element_size()
        step = min(chunk_length(longest, each, c.device), _MAX_WINDOWS)
        layers = len(projections)
        heads = weight.shape[0] // layers
        out: Tensor | None = None
        for chunk in spans(longest, step):
            band = None if z_to_p is None else self._band(z_to_p, shard, chunk)
            lo, hi = (min(w, shard.windows) for w in chunk)
            with torch.autocast(c.device.type, enabled=False):
                p = self._pairs(feats, shard, (lo, hi), of_query, of_key, band)
                p = F.layer_norm(p, (atom_z,)).view(-1, atom_z)
            part = torch.addmm(bias[:, None], weight, p.T)  # [L * H, w * 32 * 128]
            if out is None:
                out = part.new_empty(layers, shard.windows, heads, WINDOW, KEYS)
            out[:, lo:hi] = part.view(layers, heads, hi - lo, WINDOW, KEYS).transpose(1, 2)
        assert out is not None
        return out.masked_fill_(~shard.key_mask[:, None, None], MASKED)

    def _atoms(self, shard: AtomShard, rank: int, chunk: Span) -> tuple[Span, Span]:
        """Atoms of the queries and of the keys of some windows, inside a rank's buffer."""
        start, stop = shard.buffers[rank]
        lo, hi = (min(start + w * WINDOW, stop) for w in chunk)
        if lo == hi:
            return (lo, lo), (lo, lo)
        return (lo, hi), (max(lo - SIDE, start), min(hi + SIDE, stop))

    def _band(self, z_to_p: Tensor, shard: AtomShard, chunk: Span) -> tuple[Tensor, Span, Span]:
        """The box of the pair that the windows touch, with its (row, column) spans."""
        wants = []
        for rank in range(self.mesh.size):
            queries, keys = self._atoms(shard, rank, chunk)
            wants.append((shard.ranges.span(queries), shard.ranges.span(keys)))
        owns = tuple(shard.layout.tile_box(r) for r in range(self.mesh.size))
        plan = boxes_plan(self.mesh.size, self.mesh.rank, owns, tuple(wants))
        (box,) = fetch(self.mesh, plan, (z_to_p,), ((0, 1),), "atom_pair_band")
        return box, *wants[self.mesh.rank]

    def _pairs(
        self,
        feats: Feats,
        shard: AtomShard,
        chunk: Span,
        of_query: Tensor,
        of_key: Tensor,
        band: tuple[Tensor, Span, Span] | None,
    ) -> Tensor:
        """The atom-pair embedding of windows lo:hi, [w, 32, 128, atom_z]."""
        lo, hi = chunk

        def queries(x: Tensor) -> Tensor:  # [1, a, C] -> [w, 32, 1, C]
            return query_windows(x)[0, lo:hi, :, None]

        def keys(x: Tensor) -> Tensor:  # [1, a, C] -> [w, 1, 128, C]
            return key_windows(x)[0, lo:hi].transpose(1, 2)[:, None]

        linears = (self.embed_atompair_ref_pos, self.embed_atompair_ref_dist)
        weight = torch.cat([*(x.weight for x in linears), self.embed_atompair_mask.weight], 1)
        pos = shard.cut(feats["ref_pos"]).to(weight.dtype)
        uid = shard.cut(feats["ref_space_uid"])[..., None]
        mask = shard.mask[None, :, None]
        real = queries(mask) & keys(mask)
        d = keys(pos) - queries(pos)
        near = 1 / (1 + (d * d).sum(-1, keepdim=True))
        v = (real & (queries(uid) == keys(uid))).to(d.dtype)  # [w, 32, 128, 1]
        p = F.linear(torch.cat([d, near, torch.ones_like(near)], -1).mul_(v), weight)
        if band is not None and band[0].numel():
            box, rows, cols = band
            token = (shard.token + shard.tokens[0])[None, :, None]
            i = (queries(token) - rows[0]).clamp_(0, box.shape[0] - 1)
            j = (keys(token) - cols[0]).clamp_(0, box.shape[1] - 1)
            index = (i * box.shape[1] + j).flatten()
            gathered = box.reshape(-1, box.shape[2]).index_select(0, index).view(p.shape)
            p.add_(gathered.mul_(real))
        p.add_(queries(of_query)).add_(keys(of_key))
        return p.add_(self.p_mlp(p))
