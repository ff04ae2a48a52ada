"""What the executor moves in the triangle operations equals the plan, and is as little as can be.

Ranks run on shapes alone, see bench/bytes_moved.py.
"""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from bench.bytes_moved import MESHES, OPS, one_rank

N = 288  # a multiple of every mesh: without padding, messages have no alignment gaps


def ranks(op: str, rows: int, cols: int, route: str) -> list[dict[str, Any]]:
    return [one_rank(op, N, rows, cols, rank, route) for rank in range(rows * cols)]


@pytest.mark.parametrize("route", ["direct", "ring"])
@pytest.mark.parametrize("op", OPS)
def test_executor_moves_what_is_planned(op: str, route: str) -> None:
    for rows, cols in MESHES:
        found = ranks(op, rows, cols, route)
        for r in found:
            got = r["sent"], r["received"]
            assert got == (r["planned_sent"], r["planned_received"]), r
            assert r["received"] > 0, r
        assert sum(r["sent"] for r in found) == sum(r["received"] for r in found)


@pytest.mark.parametrize("op", OPS[:2])
def test_direct_multiplication_moves_each_element_once(op: str) -> None:
    for rows, cols in MESHES:
        for r in ranks(op, rows, cols, "direct"):
            assert r["received_tiles"] == r["bound_tiles"], r


@pytest.mark.parametrize("op", OPS[:2])
def test_two_and_a_half_tiles_on_2x2(op: str) -> None:
    tiles = [r["received_tiles"] for r in ranks(op, 2, 2, "direct")]
    assert statistics.mean(tiles) == 2.5
    assert max(tiles) == 3


@pytest.mark.parametrize("op", OPS[2:])
def test_attention_moves_little_beyond_the_bound(op: str) -> None:
    # Each chunk of lines fetches the bias again; keys and values come once.
    for rows, cols in MESHES:
        for r in ranks(op, rows, cols, "direct"):
            assert r["bound_tiles"] <= r["received_tiles"] <= r["bound_tiles"] + 1, r
