"""Name what modules ask of whoever writes matrices."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class MatrixSink(Protocol):
    """Takes matrices of one prediction in row blocks, on the root rank."""

    def rows(self, name: str, sample: int, lo: int, block: Tensor) -> None:
        """Take rows lo, lo + 1, ... of one matrix.

        Args:
            name: "pae" or "pde" (angstrom), or "z" (the pair representation, sample 0).
            sample: number of the sample, in the order of sampling.
            lo: the first row; blocks of one matrix come in increasing order without gaps.
            block: [rows, N], or [rows, N, C] for "z", on any device; valid until this returns.
        """
