"""The whole model on meshes against stock Boltz-2 with the same seed, in float64 and float32.

float64: both sides run in float64 with casts included, so that no wrong term can hide.
float32: tolerances are how far stock's own outputs move when its weights change by 1e-7
(measured in the same test), times a margin for the different order of sums.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import parity
import pytest
import torch
from ranks import run

from foldcp.boltz.families.swap import apply
from foldcp.fabric.mesh import Mesh
from foldcp.layout.strategies import ATTENTION, MULTIPLICATION, Sizes
from foldcp.planner.choice import chunk_count
from foldcp.planner.rates import CPU, ONE_MACHINE
from foldcp_kernels.core.chunking import set_chunk_bytes

EXAMPLES = parity.EXAMPLES
INPUTS = ("ubiquitin", "heterodimer", "tetramer")
STEPS, SAMPLES, RECYCLES = 20, 2, 2
FLOAT64 = 1e-7  # relative to the largest value of each output
MARGIN = 5  # float32: times stock's own movement under a 1e-7 change of its weights
# A distance that crosses a bin edge of the confidence module moves one pair by this much in stock
# itself (measured at 60 residues, angstrom); whether one does depends on the processor.
BIN_EDGE = {"pae": 0.05, "pde": 0.05}


def predict(mesh: Mesh, folder: str, name: str, dtype: torch.dtype) -> dict[str, Any]:
    """One prediction of a swapped model; results as the writer gets them (root rank only)."""
    prepared = parity.prepare(folder, EXAMPLES / f"{name}.yaml")
    model = parity.build_model(dtype=dtype)
    apply(model, mesh)
    feats = parity.compact_features(prepared)
    return parity.stock_outputs(model, feats, steps=STEPS, samples=SAMPLES, recycling=RECYCLES)


def cases(
    mesh: Mesh, folder: str, wanted: list[tuple[str, torch.dtype]], multiple: int, **policy: str
) -> dict:
    mesh = replace(mesh, multiple=multiple).with_policy(**policy)
    return {case: predict(mesh, folder, *case) for case in wanted}


@lru_cache
def stock(folder: str, name: str, dtype: torch.dtype, moved: bool = False) -> dict[str, Any]:
    prepared = parity.prepare(folder, EXAMPLES / f"{name}.yaml")
    model = parity.build_model(dtype=dtype)
    model = parity.perturbed(model) if moved else model
    feats = parity.stock_features(prepared)
    return parity.stock_outputs(model, feats, steps=STEPS, samples=SAMPLES, recycling=RECYCLES)


def compare(got: dict[str, Any], folder: str, name: str, dtype: torch.dtype) -> None:
    want = dict(stock(folder, name, dtype))
    want.pop("z")
    got = {k: v for k, v in got.items() if k != "z"}
    away = parity.largest_differences(got, want)
    if dtype == torch.float64:
        scale = parity.largest_differences(want, {k: _zeros(v) for k, v in want.items()})
        for key, e in away.items():
            assert e <= FLOAT64 * max(1.0, scale[key]), f"{name} {key}: {e:.2e}"
        return
    moved = dict(stock(folder, name, dtype, moved=True))
    moved.pop("z")
    floor = parity.largest_differences(moved, want)
    for key, e in away.items():
        bound = max(MARGIN * max(floor[key], 1e-6), BIN_EDGE.get(key, 0.0))
        assert e <= bound, f"{name} {key}: {e:.2e}, stock itself moves {floor[key]:.2e}"


def _zeros(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _zeros(v) for k, v in value.items()}
    return torch.zeros_like(value) if isinstance(value, torch.Tensor) else 0


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    for name in INPUTS:
        parity.prepare(path, EXAMPLES / f"{name}.yaml")
    return str(Path(path))


# Tiles in multiples of 16, as on CUDA, pad these inputs by up to half of N.
@pytest.mark.parametrize(
    "rows,cols,multiple", [(1, 1, 16), (1, 2, 1), (2, 2, 16), (2, 3, 1), (3, 3, 1)]
)
def test_same_seed_same_structure(folder: str, rows: int, cols: int, multiple: int) -> None:
    # Every input in float64 on 1x1 and 2x2, one on the others; in float32 too up to 2x2.
    names = INPUTS if rows == cols < 3 else INPUTS[1:2]
    wanted = [(name, torch.float64) for name in names]
    wanted += [(name, torch.float32) for name in (names if rows * cols <= 4 else ())]
    root = run(rows, cols, cases, folder, wanted, multiple)[0]
    for (name, dtype), got in root.items():
        compare(got, folder, name, dtype)


def lean(mesh: Mesh, folder: str) -> tuple[dict, dict[str, int]]:
    """Outputs in float64 in lean memory with so small a chunk that tiles are cut; chunks by op."""
    set_chunk_bytes(20_000)
    try:
        found = cases(mesh, folder, [(INPUTS[1], torch.float64)], 1, memory="lean")
        sizes = Sizes(8, 8, lean=True)
        shape = mesh.rows, mesh.cols
        cuts = {
            op: chunk_count(op, name, 120, shape, sizes, CPU, ONE_MACHINE, 20_000)
            for op, name in ((MULTIPLICATION, "channel"), (ATTENTION, "rows"))
        }
        return found, cuts
    finally:
        set_chunk_bytes(None)


@pytest.mark.parametrize("rows,cols", [(1, 1), (2, 2)])
def test_lean_memory_changes_no_result(folder: str, rows: int, cols: int) -> None:
    found, cuts = run(rows, cols, lean, folder)[0]
    assert all(count > 8 for count in cuts.values()), cuts
    ((name, dtype),) = found
    compare(found[name, dtype], folder, name, dtype)
