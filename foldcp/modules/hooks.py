"""Name what the prediction of one input asks of whoever runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from foldcp.modules.confidence.ratings import Ratings
from foldcp.modules.settings import Features, Settings

Like = dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]  # shape, dtypes that may be
Sizes = dict[tuple[str, int], int]  # numbers in each matrix, by its name and sample


class MatrixSink(Protocol):
    """Takes matrices of one prediction some rows at a time, on the root rank."""

    def rows(self, name: str, sample: int, lo: int, values: Tensor) -> None:
        """Take rows lo, lo + 1, ... of one matrix.

        Args:
            name: "pae" or "pde" (angstrom), or "z" (the pair representation, sample 0).
            sample: number of the sample, in the order of sampling.
            lo: the first row; those of one matrix come in increasing order without gaps.
            values: [rows, N], or [rows, N, C] for "z", on any device; valid until this returns.
        """


class KeptTrunk(Protocol):
    """Keeps the result of one input's trunk, so that a run that died need not compute it again."""

    def load(self, like: Like) -> tuple[Tensor, Tensor] | None:
        """Load `s` and `z` if they were kept; may replace `ref_pos` in the features."""

    def save(self, s: Tensor, z: Tensor) -> None:
        """Keep them.

        Args:
            s: single shard [1, n, C_s].
            z: pair tile [1, T_r, T_c, C].
        """

    def drop(self) -> None:
        """Remove what was kept: the prediction is on disk."""


@dataclass(frozen=True)
class Outputs:
    """Prediction of one input.

    Args:
        coords: of the samples [M, A, 3], angstrom.
        s: single representation [1, N, C_s].
        bfactor: logits of B-factors [1, N, bins]; None of a model without them.
        z: pair representation [1, N, N, C] on the root rank; None elsewhere, where nobody wants it,
            and where a sink took it.
        ratings: confidence in the samples; None of a model without it.
    """

    coords: Tensor
    s: Tensor
    bfactor: Tensor | None = None
    z: Tensor | None = None
    ratings: Ratings | None = None


@dataclass(frozen=True)
class Folded:
    """The result of one input, on one rank.

    Args:
        feats: compact features.
        outputs: what was predicted.
        sink: took the matrices on the root rank; None: they are in `outputs`.
        kept: keeps the trunk; None: nobody does.
    """

    feats: Features
    outputs: Outputs
    sink: MatrixSink | None = None
    kept: KeptTrunk | None = None


class Hooks:
    """Surround the folding of one input. These do nothing: features in, outputs out.

    The ranks of the mesh call each of them together, in the order of the methods, except `attempt`,
    inside of which all others are called.
    """

    def attempt(self, work: Callable[[], Any]) -> Any:
        """Do all the work of the input, or drop the input on all ranks; returns its result."""
        return work()

    def features(self, batch: Any) -> Features:
        """Return the features of the input, the same on all ranks and on their devices.

        Args:
            batch: what the data loader of this rank gave.

        Raises:
            InputLost: they could not be computed.
        """
        return batch

    def open_outputs(self, sizes: Sizes) -> MatrixSink | None:
        """Make room for the matrices; returns what takes them on the root rank, None for memory.

        Raises:
            InputLost: there is no room.
        """

    def keep_trunk(self, feats: Features, settings: Settings) -> KeptTrunk | None:
        """Return what keeps the trunk of the input, None when nobody does.

        Args:
            feats: compact features.
            settings: of the prediction.
        """

    def at(self, stage: str, done: int, total: int) -> None:
        """Hear that the prediction has come to a stage.

        Args:
            stage: its name.
            done: units that are finished.
            total: units of the stage.
        """

    def hand_over(self, folded: Folded) -> Any:
        """Take the result; returns what the caller of the prediction gets."""
        return folded.outputs


class Wanted:
    """Passes the matrices that are wanted on to another sink, and drops the others.

    Args:
        sink: takes the rows.
        sizes: of the wanted matrices.
    """

    def __init__(self, sink: MatrixSink, sizes: Sizes) -> None:
        self._sink, self._sizes = sink, sizes

    def rows(self, name: str, sample: int, lo: int, values: Tensor) -> None:
        """See `MatrixSink`."""
        if (name, sample) in self._sizes:
            self._sink.rows(name, sample, lo, values)
