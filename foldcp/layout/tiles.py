"""Tilings of pair, token and atom tensors over the ranks: integers only, known to every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import lcm
from typing import Protocol

Span = tuple[int, int]
Box = tuple[Span, ...]

WINDOW = 32  # atoms of one query window
KEYS = 128  # atoms of one key window, centred on the query window


class Shaped(Protocol):
    """Anything with a shape and a dimension count (a tensor)."""

    ndim: int

    @property
    def shape(self) -> Sequence[int]:
        """Sizes of the dimensions."""


@dataclass(frozen=True)
class PairLayout:
    """The 2D tiling of an N x N pair tensor over a mesh of rows x cols ranks.

    Rank `r * cols + c` holds the tile (rows of r, columns of c). N is padded so that all tiles have
    one shape, whose sides and panels are multiples of `multiple`: kernels, matrix products and
    messages then find every row aligned. Tokens travel in P equal shards, i on rank i. Layouts of a
    mesh are made by `Mesh.layout`.

    Args:
        n: number of tokens N, at least 1.
        mesh_rows: ranks along the rows (R).
        mesh_cols: ranks along the columns (Q).
        rank: this rank, 0 <= rank < R * Q.
        multiple: of tokens, for the sides of tiles and panels.
    """

    n: int
    mesh_rows: int
    mesh_cols: int
    rank: int
    multiple: int = 1

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"`n` must be at least 1 token, got {self.n}")
        if not 0 <= self.rank < self.mesh_rows * self.mesh_cols:
            raise ValueError(
                f"`rank` {self.rank} is outside the mesh {self.mesh_rows}x{self.mesh_cols}"
            )

    @property
    def size(self) -> int:
        """P, the number of ranks."""
        return self.mesh_rows * self.mesh_cols

    @property
    def row(self) -> int:
        """This rank's row of the mesh."""
        return self.rank // self.mesh_cols

    @property
    def col(self) -> int:
        """This rank's column of the mesh."""
        return self.rank % self.mesh_cols

    @cached_property
    def padded(self) -> int:
        """N padded to a multiple of P and of all panels."""
        unit = lcm(self.size, self.multiple * self.panels)
        return -(-self.n // unit) * unit

    @cached_property
    def tile_rows(self) -> int:
        """T_r, rows of one tile."""
        return self.padded // self.mesh_rows

    @cached_property
    def tile_cols(self) -> int:
        """T_c, columns of one tile."""
        return self.padded // self.mesh_cols

    @cached_property
    def shard(self) -> int:
        """Tokens of one shard."""
        return self.padded // self.size

    @cached_property
    def panels(self) -> int:
        """L = lcm(R, Q), the number of panels that k is cut in."""
        return lcm(self.mesh_rows, self.mesh_cols)

    def row_span(self, rank: int | None = None) -> Span:
        """Return the tokens of the rows of a rank's tile."""
        r = (self.rank if rank is None else rank) // self.mesh_cols
        return r * self.tile_rows, (r + 1) * self.tile_rows

    def col_span(self, rank: int | None = None) -> Span:
        """Return the tokens of the columns of a rank's tile."""
        c = (self.rank if rank is None else rank) % self.mesh_cols
        return c * self.tile_cols, (c + 1) * self.tile_cols

    def shard_span(self, rank: int | None = None) -> Span:
        """Return the tokens of a rank's shard; the shards of one mesh row make up its rows."""
        i = self.rank if rank is None else rank
        return i * self.shard, (i + 1) * self.shard

    def tile_box(self, rank: int | None = None) -> Box:
        """Return (rows, columns) of a rank's tile."""
        return self.row_span(rank), self.col_span(rank)

    def panel_span(self, panel: int) -> Span:
        """Return the tokens of one panel of k."""
        width = self.padded // self.panels
        return panel * width, (panel + 1) * width

    def panels_of(self, along_cols: bool) -> int:
        """Return the number of panels in one tile's columns (or rows)."""
        return self.panels // (self.mesh_cols if along_cols else self.mesh_rows)

    def panel_at(self, rank: int, step: int) -> int:
        """Return the panel of a rank at a step: balanced, and local at step 0 where possible.

        Args:
            rank: a rank.
            step: its step.
        """
        r, c = divmod(rank, self.mesh_cols)
        k = self.panels
        return (step + c * (k // self.mesh_cols) + r * (k // self.mesh_rows)) % k

    def valid(self, span: Span) -> int:
        """Return how many tokens of a span are real (not padding)."""
        return max(0, min(span[1], self.n) - span[0])

    def check(self, z: Shaped, name: str = "z", channels_last: bool = True) -> None:
        """Raise ValueError unless `z` is [B, T_r, T_c, ...] (or [B, C, T_r, T_c]).

        Args:
            z: the tensor.
            name: of the argument, for the message.
            channels_last: the tile's dimensions come before the channels.
        """
        lead = 1 if channels_last else 2
        want = (self.tile_rows, self.tile_cols)
        if z.ndim < lead + 2 or tuple(z.shape[lead : lead + 2]) != want:
            fits = z.ndim >= lead + 2
            ahead = [*z.shape[:lead]] if fits else ["B", "C"][:lead]
            expected = ", ".join(map(str, [*ahead, *want, *z.shape[lead + 2 :]]))
            raise ValueError(
                f"`{name}` tile is {list(z.shape)}; layout (N={self.n}, mesh "
                f"{self.mesh_rows}x{self.mesh_cols}) expects [{expected}]"
            )


@dataclass(frozen=True)
class AtomLayout:
    """Contiguous shards of 32-atom windows, one per rank.

    Args:
        windows: number of windows of the sample (atoms / 32).
        size: number of ranks P.
        rank: this rank.
    """

    windows: int
    size: int
    rank: int

    @property
    def atoms(self) -> int:
        """Atoms of the sample, padded to whole windows."""
        return self.windows * WINDOW

    @property
    def shard(self) -> int:
        """Windows of one rank's shard (the last ranks may hold fewer real ones)."""
        return -(-self.windows // self.size)

    def own_span(self, rank: int | None = None) -> Span:
        """Return the atoms of a rank's shard."""
        i = self.rank if rank is None else rank
        lo = min(i * self.shard, self.windows)
        return lo * WINDOW, min(lo + self.shard, self.windows) * WINDOW
