"""Errors of low-precision formats at the sites that use them, against float64, on a CPU.

    python -m bench.precision                    # bench/results/cpu/precision.csv

A site is run in Boltz-2's dimensions by the torch implementation, under autocast to bfloat16 as in
a run on a GPU. The error is the relative L2 distance, of the contraction from its truth, and of the
update from what the op adds to z. `tests/kernels/test_precision.py` bounds errors by this table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.machine import ROOT, write_csv
from foldcp_kernels.triangle_multiplication import (
    TriangleMultiplicationWeights,
    definition,
    triangle_multiplication,
)
from foldcp_kernels.triangle_multiplication.contraction import contract
from foldcp_kernels.triangle_multiplication.parts import (
    choose_parts,
    project_planes,
    scaled_planes,
)

OUT = ROOT / "bench" / "results" / "cpu" / "precision.csv"
CHANNELS, TOKENS = 128, 72
CONTRACTION, UPDATE = "contraction", "triangle multiplication"
FORMATS = ("bf16", "fp8")  # of the contraction; all else is in bf16


@dataclass
class Case:
    """One triangle multiplication in float32; its truth is that of the same numbers in float64.

    Args:
        z: [1, N, N, C].
        mask: [1, N, N].
        weights: of the op, in the order of its dataclass.
    """

    z: Tensor
    mask: Tensor
    weights: list[Tensor]

    def op(self, dtype: torch.dtype = torch.float32) -> TriangleMultiplicationWeights:
        """The weights in a dtype."""
        return TriangleMultiplicationWeights(*(x.to(dtype) for x in self.weights))


def plain(seed: int = 1) -> Case:
    """Draw normal numbers, weights that keep the size of what they multiply, gains near 1."""
    g = torch.Generator().manual_seed(seed)
    c = CHANNELS

    def norm() -> list[Tensor]:
        return [x(0.1 * torch.randn(c, generator=g)) for x in (torch.exp, torch.clone)]

    def linear(outs: int) -> Tensor:
        return torch.randn(outs, c, generator=g) / c**0.5

    z = torch.randn(1, TOKENS, TOKENS, c, generator=g)
    mask = torch.ones(1, TOKENS, TOKENS)
    weights = [*norm(), linear(2 * c), linear(2 * c), *norm(), linear(c), linear(c)]
    return Case(z, mask, weights)


def _apart(case: Case) -> None:
    case.z *= torch.randn(CHANNELS, generator=torch.Generator().manual_seed(7)).exp()


def _outliers(case: Case) -> None:
    case.z[..., 7] *= 20
    case.z[..., 50] *= 10


def _offset(case: Case) -> None:
    case.z += 5


def _gates(case: Case) -> None:
    """Shift what the gates of the planes see by -6, along the shift of the LayerNorm."""
    shift = case.weights[1]
    case.weights[3] -= 6 * shift / shift.square().sum()


def _masked(case: Case) -> None:
    case.mask[0, TOKENS // 2] = 0


def _zero(case: Case) -> None:
    case.z[0, TOKENS // 3] = 0


def _tiny_row(case: Case) -> None:
    case.z[0, TOKENS // 3] *= 1e-30


def _tiny(case: Case) -> None:
    """Each plane is one number then: its rounding does not average out over k."""
    case.z *= 1e-30


INPUTS: dict[str, Callable[[Case], None]] = {
    "plain": lambda case: None,
    "channels apart by e": _apart,
    "two channels x10 and x20": _outliers,
    "common offset": _offset,
    "gates shifted by -6": _gates,
    "masked row": _masked,
    "row of zeros": _zero,
    "row of 1e-30": _tiny_row,
    "all 1e-30": _tiny,
}


def drawn(name: str) -> Case:
    """Draw a case.

    Args:
        name: of `INPUTS`.
    """
    case = plain()
    INPUTS[name](case)
    return case


def truths(case: Case) -> dict[str, Tensor]:
    """Return the contraction [1, N, N, D] and the update [1, N, N, C] in float64."""
    z, mask, w = case.z.double(), case.mask.double(), case.op(torch.float64)
    contraction = definition.contraction(z, mask, w, True)
    return {
        CONTRACTION: contraction,
        UPDATE: definition.triangle_multiplication(z, mask, w, True) - z,
    }


def results(case: Case, kind: str) -> dict[str, Tensor]:
    """Return what the op makes of a case, as `truths`.

    Args:
        case: the inputs.
        kind: of `FORMATS`.
    """
    w, asked = case.op(), "fp8" if kind == "fp8" else "same"
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        parts = choose_parts(case.z, w, "torch", asked)
        ab = project_planes(case.z, case.mask, w, parts)
        scaled = scaled_planes(case.z, w, parts, (0, CHANNELS))
        x = contract(None, ab[:, :CHANNELS], ab[:, CHANNELS:], True, scaled=scaled)
        z = triangle_multiplication(case.z.clone(), case.mask, w, True, "torch", asked)
    return {CONTRACTION: x.permute(0, 2, 3, 1), UPDATE: z.double() - case.z.double()}


def error(got: Tensor, want: Tensor) -> float:
    """Relative L2 distance; NaN where a result is."""
    return ((got.double() - want).norm() / want.norm()).item()


def measure(name: str, kind: str) -> dict[str, float]:
    """Return the error of each site.

    Args:
        name: of `INPUTS`.
        kind: of `FORMATS`.
    """
    case = drawn(name)
    wanted, got = truths(case), results(case, kind)
    return {site: error(got[site], want) for site, want in wanted.items()}


def main(arguments: list[str] | None = None) -> int:
    """Write the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.precision")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for kind in FORMATS:
        for name in INPUTS:
            for site, found in measure(name, kind).items():
                rows.append({"site": site, "format": kind, "inputs": name, "error": f"{found:.5f}"})
                print(f"{site:24} {kind:5} {name:26} {100 * found:.3f} %")
    write_csv(options.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
