"""What the executor moves in the triangle operations equals the plan, and is as little as can be.

Ranks run on shapes alone, see bench/bytes_moved.py.
"""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from bench.bytes_moved import MESHES, OPS, one_rank, strategies
from foldcp.layout.strategies import Sizes
from foldcp.layout.tiles import PairLayout
from foldcp.planner.choice import received

N = 288  # a multiple of every mesh: without padding, messages have no alignment gaps
CASES = [(op, name) for op in OPS for name in strategies(op)]


def ranks(
    op: str, rows: int, cols: int, name: str, wire: str = "raw", n: int = N
) -> list[dict[str, Any]]:
    return [one_rank(op, n, rows, cols, rank, name, wire) for rank in range(rows * cols)]


@pytest.mark.parametrize(("op", "name"), CASES)
def test_executor_moves_what_is_planned_and_modelled(op: str, name: str) -> None:
    for rows, cols in MESHES:
        found = ranks(op, rows, cols, name)
        # Panels of attention take an exchange per chunk of lines; whole lines two more, there and
        # back.
        count = found[0]["exchanges"] // (3 if name == "rows" else 1)
        first = op.endswith(("outgoing", "starting"))
        layout = PairLayout(N, rows, cols, 0)
        modelled = received(op.rpartition("_")[0], name, layout, Sizes(4, 4), first, count)
        for r, expected in zip(found, modelled, strict=True):
            got = r["sent"], r["received"]
            assert got == (r["planned_sent"], r["planned_received"]), r
            assert r["received"] == expected > 0, r
        assert sum(r["sent"] for r in found) == sum(r["received"] for r in found)


@pytest.mark.parametrize("name", ["panel-direct", "panel-ring", "channel"])
def test_fp8_moves_a_byte_per_element_and_its_scales(name: str) -> None:
    for r in ranks(OPS[0], 2, 2, name, "fp8", n=256):
        raw = one_rank(OPS[0], 256, 2, 2, r["rank"], name)
        assert r["received"] == r["planned_received"] == raw["received"] // 4 * 33 // 32, r
        assert r["sent"] == r["planned_sent"], r


@pytest.mark.parametrize("op", OPS[:2])
def test_direct_multiplication_moves_each_element_once(op: str) -> None:
    for rows, cols in MESHES:
        for r in ranks(op, rows, cols, "panel-direct"):
            assert r["received_tiles"] == r["bound_tiles"], r


@pytest.mark.parametrize("op", OPS[:2])
def test_two_and_a_half_tiles_on_2x2(op: str) -> None:
    tiles = [r["received_tiles"] for r in ranks(op, 2, 2, "panel-direct")]
    assert statistics.mean(tiles) == 2.5
    assert max(tiles) == 3


@pytest.mark.parametrize("op", OPS[:2])
def test_channels_move_three_tiles_at_most(op: str) -> None:
    # There: a and b of all other ranks' channels; back: one result. P divides 128 channels.
    for rows, cols in ((1, 2), (2, 2), (2, 4)):
        for r in ranks(op, rows, cols, "channel"):
            assert r["received_tiles"] == 3 * (1 - 1 / (rows * cols)), r


@pytest.mark.parametrize("op", OPS[2:])
def test_attention_moves_little_beyond_the_bound(op: str) -> None:
    # Each chunk of lines fetches the bias again; keys and values come once.
    for rows, cols in MESHES:
        for r in ranks(op, rows, cols, "panel-direct"):
            assert r["bound_tiles"] <= r["received_tiles"] <= r["bound_tiles"] + 1, r
