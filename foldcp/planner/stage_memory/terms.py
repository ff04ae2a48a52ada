"""Count the tensors of a rank, each kind by its own term.

Fused kernels on a GPU, as the tables of the models run. A term is derived from the code that it
names, unless its docstring says that its factor is empirical: counted with the exact figure of
`foldcp.boltz.dry_run`.
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
_ALIGNMENT, _ATOM, _TOKEN = 11, 84, 300
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
        """Whether memory is lean."""
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
    """Count the shards of the single track: input embedding, single, both sides of z."""
    return 8 * case.layout.shard * case.dims.token_s * FLOAT32


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
