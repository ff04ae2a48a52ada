"""Count the tensors of a rank, each kind by its own term.

Fused kernels on a GPU, as the tables of the models run. A term is derived from the code that it
names, unless its docstring says that its factor is empirical: counted with the exact figure of
`foldcp.boltz.families.dry_run`. On tiles of less than about 1,000 tokens a side, where an op
is not cut, the peak was up to 6.5 % too high (1,000 tokens on 1x2 in lean memory, 1,500 on 4x4).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from foldcp.layout.tiles import WINDOW, AtomLayout, PairLayout
from foldcp.planner.dims import Dims
from foldcp.planner.workload import Setup, Workload
from foldcp_kernels.core.chunking import rows_within

FLOAT32 = 4
ALIGNED = 16  # tokens that sides of tiles are multiples of on a GPU, see `foldcp.fabric.mesh.Mesh`
# Bytes of what features hold for an element of the alignment, an atom and a token.
_ALIGNMENT, _ATOM, _TOKEN = 11, 84, 264
_HALO = 6  # windows that a rank's atoms need of each neighbour in three layers


@dataclass(frozen=True)
class Case:
    """One prediction on one rank of a mesh.

    Args:
        workload: the input.
        setup: the mesh and its choices.
        dims: sizes of the model.
        rank: of the mesh.
    """

    workload: Workload
    setup: Setup
    dims: Dims
    rank: int

    @cached_property
    def layout(self) -> PairLayout:
        """The tiling, padded as on a GPU."""
        s = self.setup
        return PairLayout(self.workload.tokens, s.rows, s.cols, self.rank, ALIGNED)

    @property
    def pairs(self) -> int:
        """Pairs of a tile."""
        return self.layout.tile_rows * self.layout.tile_cols

    @property
    def lean(self) -> bool:
        """Return True in lean memory."""
        return self.setup.memory == "lean"

    @property
    def itemsize(self) -> int:
        """Bytes of an element of what the pair track computes in."""
        return max(self.setup.itemsize, self.dims.itemsize)

    @property
    def z(self) -> int:
        """Bytes of the pair tile."""
        return self.pairs * self.dims.token_z * self.setup.z_itemsize

    @property
    def tile(self) -> int:
        """Bytes of a tile of all channels in what is computed in."""
        return self.pairs * self.dims.token_z * self.itemsize

    @property
    def sequences(self) -> int:
        """Rows of the alignment that the MSA module takes."""
        return max(1, min(self.workload.sequences, self.dims.msa_rows))

    @cached_property
    def atoms(self) -> int:
        """Atoms of the windows of this rank, with those of its neighbours that they need."""
        windows = AtomLayout(-(-self.workload.atoms // WINDOW), self.setup.size, self.rank)
        lo, hi = windows.own_span()
        return min(hi + _HALO * WINDOW, windows.atoms) - max(lo - _HALO * WINDOW, 0)

    def chunk(self, total: int, each: int, at_most: int = 0, uncut: bool = False) -> int:
        """Count the rows that a chunk of an op takes.

        Args:
            total: rows in all.
            each: bytes of one.
            at_most: chunks, 0 for any number.
            uncut: see `foldcp_kernels.core.chunking.chunk_length`.
        """
        return rows_within(self.setup.chunk_bytes, total, each, at_most, uncut)


def features(case: Case) -> int:
    """Count the features, which every rank holds of the whole input."""
    w = case.workload
    alignment = _ALIGNMENT * max(1, w.sequences) * w.tokens
    return alignment + _ATOM * -(-w.atoms // WINDOW) * WINDOW + _TOKEN * w.tokens


def singles(case: Case) -> int:
    """Count the shards of the single track: input embedding, single, what both sides of z add."""
    return 4 * case.layout.shard * case.dims.token_s * FLOAT32


def gathered_single(case: Case) -> int:
    """Count the single of all tokens, which every rank of a mesh holds from the distogram on."""
    return 0 if case.layout.size == 1 else case.layout.padded * case.dims.token_s * FLOAT32


def pooled(case: Case) -> int:
    """Count the exchanges' buffers that wait for the next exchange: half of their most, empirical.

    Source: foldcp/fabric/exchange/messages/pool.py.
    """
    return 0 if case.layout.size == 1 else 8 << 20


def masks(case: Case) -> int:
    """Count the mask of the pairs, float32."""
    return FLOAT32 * case.pairs


def contacts(case: Case) -> int:
    """Count the contact probabilities of the tile, from the distogram to the end."""
    return FLOAT32 * case.pairs


def token_biases(case: Case) -> int:
    """Count the biases of all layers of the diffusion transformer, [L, H, T_r, T_c]."""
    d = case.dims
    return d.token_layers * d.token_heads * case.pairs * case.itemsize


def atom_biases(case: Case, layers: int) -> int:
    """Count the biases of atom windows.

    Args:
        case: the prediction.
        layers: whose biases exist.
    """
    d = case.dims
    windows = case.atoms // WINDOW
    return layers * windows * d.atom_heads * d.queries * d.keys * case.itemsize


def atom_rows(case: Case, count: int) -> int:
    """Count so many activations of the rank's atoms.

    Args:
        case: the prediction.
        count: of them.
    """
    return count * case.atoms * case.dims.atom_s * FLOAT32


def alignment(case: Case) -> int:
    """Count the embedded alignment of the rank's tokens and its mask, float32."""
    return case.sequences * case.layout.shard * (case.dims.msa_s + 1) * FLOAT32


def outer_product(case: Case) -> int:
    """Count the outer product mean beside the alignment.

    The normed alignment and both factors of the rank's tokens in float32; the factors of the
    tile's rows and columns as they arrive, as they are computed with, and as the kernel wants
    them; counts of the pairs.
    """
    d, lay, e = case.dims, case.layout, case.itemsize
    own = lay.shard * (d.msa_s + 2 * d.outer_width + 1) * FLOAT32
    arrives = (d.outer_width + 1) * FLOAT32 if lay.size > 1 else 0
    converted = 0 if e == FLOAT32 else e * d.outer_width
    ends = (lay.tile_rows + lay.tile_cols) * (arrives + converted + e * d.outer_width)
    return case.sequences * (own + ends) + FLOAT32 * case.pairs


def averaging(case: Case) -> int:
    """Count pair weighted averaging beside the alignment.

    Weights of all heads in float32, twice while they are normed; of a chunk of sequences values of
    the tile's columns and results of its rows.
    """
    d, lay = case.dims, case.layout
    width = d.averaging_heads * d.averaging_width
    each = (2 * lay.tile_cols + 3 * lay.tile_rows) * width
    rows = case.chunk(case.sequences, FLOAT32 * each, 8 if lay.size > 1 else 0)
    return 2 * d.averaging_heads * FLOAT32 * case.pairs + rows * each * case.itemsize


def conditioned_rows(case: Case) -> int:
    """Count a chunk of rows of the conditioned pair.

    Its tensors are two fifths of what the chunk is made for: empirical.
    """
    d, lay = case.dims, case.layout
    heads = d.token_layers * d.token_heads
    each = lay.tile_cols * (12 * d.token_z + 2 * heads) * case.setup.z_itemsize
    return 2 * each * case.chunk(lay.tile_rows, each) // 5


def window_pairs(case: Case) -> int:
    """Count the atom pairs of a chunk of windows, about as many on every input: empirical."""
    return 30 << 20


def token_layer(case: Case) -> int:
    """Count a layer of the diffusion transformer.

    Of every sample queries and results of the tile's rows, four tensors, keys and values of its
    columns; of the rank's tokens 12 tensors of a sample and 11 of all: empirical.
    """
    d, lay, together = case.dims, case.layout, case.workload.together
    fetched = 4 * lay.tile_rows + 2 * lay.tile_cols if lay.size > 1 else 0
    tensors = together * fetched + lay.shard * (11 + 12 * together)
    return tensors * 2 * d.token_s * FLOAT32 + atom_rows(case, together)


def window_layer(case: Case) -> int:
    """Count a layer over atom windows: 14 activations of each sample, empirical."""
    return atom_rows(case, 14 * case.workload.together)


def mirrored_rows(case: Case) -> int:
    """Count a chunk of rows of the transposed pair, which comes from another rank.

    On a square mesh the ranks of the diagonal have their own.
    """
    d, lay = case.dims, case.layout
    if lay.size == 1 or (lay.mesh_rows == lay.mesh_cols and lay.row == lay.col):
        return 0
    each = lay.tile_cols * (6 * d.token_z * case.setup.z_itemsize + 2 * d.bins * FLOAT32)
    return 9 * each * case.chunk(lay.tile_rows, each) // 10
