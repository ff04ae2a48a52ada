"""Schedules are integers: every piece arrives exactly once, sends match receives, on every mesh."""

from __future__ import annotations

from math import lcm

import pytest

from foldcp.layout import Box, PairLayout
from foldcp.plans import (
    partials_plan,
    root_plan,
    slots_plan,
    token_plan,
    transpose_plan,
    triangle_attention_plan,
    triangle_multiplication_plan,
)
from foldcp.schedule import Plan, intersect, volume

SMALL = [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (3, 2), (3, 3), (2, 4), (4, 2)]
LARGE = [(4, 4), (4, 8), (8, 8), (16, 16)]


def plans(rows: int, cols: int, build) -> list[Plan]:
    n = 3 * rows * cols - 1  # odd, padded
    return [build(PairLayout(n, rows, cols, r)) for r in range(rows * cols)]


def check(made: list[Plan]) -> None:
    """Sends match receives in order, each want is covered once, senders hold what they send."""
    for step in range(len(made[0].steps)):
        for me, mine in enumerate(made):
            s = mine.steps[step]
            for slot, want in enumerate(s.wants):
                parts = [p.box for p in (*s.local, *s.recvs) if p.slot == slot]
                assert sum(map(volume, parts)) == volume(want.box)
                for i, a in enumerate(parts):
                    assert all(intersect(a, b) is None for b in parts[i + 1 :])
            for peer in {p.peer for p in (*s.sends, *s.recvs)}:
                there = made[peer].steps[step]
                sent = [(p.slot, p.box, p.held) for p in there.sends if p.peer == me]
                assert sent == [(p.slot, p.box, p.held) for p in s.recvs if p.peer == peer]
            for p in s.sends:
                if p.held >= 0:
                    assert step > 0 and mine.steps[step - 1].wants[p.held].box == p.box
                else:
                    assert intersect(p.box, mine.owned[p.source]) == p.box


BUILDERS = {
    "mult outgoing": lambda x: triangle_multiplication_plan(x, 4, True, 2, "direct"),
    "mult incoming": lambda x: triangle_multiplication_plan(x, 4, False, 1, "direct"),
    "mult ring": lambda x: triangle_multiplication_plan(x, 4, True, 1, "ring"),
    "att start": lambda x: triangle_attention_plan(x, True, (0, 2), "direct"),
    "att end": lambda x: triangle_attention_plan(x, False, (1, 3), "direct"),
    "att ring": lambda x: triangle_attention_plan(x, True, (0, 2), "ring"),
    "tokens": lambda x: token_plan(x, ("rows", "cols", "all")),
    "partials": lambda x: partials_plan(x, 2),
    "transpose": lambda x: transpose_plan(x, 3),
    "root": lambda x: root_plan(x, 2),
    "slots": lambda x: slots_plan(x.size, x.rank),
}


@pytest.mark.parametrize("rows,cols", SMALL)
def test_every_piece_arrives_once(rows: int, cols: int) -> None:
    for build in BUILDERS.values():
        check(plans(rows, cols, build))


@pytest.mark.parametrize("rows,cols", SMALL + LARGE)
def test_panels_are_visited_once_and_balanced(rows: int, cols: int) -> None:
    panels = lcm(rows, cols)
    worst = 0.0
    total = []
    tile = volume(PairLayout(rows * cols, rows, cols, 0).tile_box())
    sent = [[0] * panels for _ in range(rows * cols)]
    for rank in range(rows * cols):
        layout = PairLayout(rows * cols, rows, cols, rank)
        assert sorted(layout.panel_at(rank, t) for t in range(panels)) == list(range(panels))
        mine = triangle_multiplication_plan(layout, 1, True, 1, "direct")
        total.append(mine.elements()[1] / tile)
        for t, s in enumerate(mine.steps):
            sent[rank][t] = sum(volume(p.box) for p in s.sends) / tile
            assert len({p.peer for p in s.sends}) <= 3
        worst = max(worst, max(sent[rank]))
    bound = (rows - 1) / 1 + (cols - 1)  # every rank must receive its row and its column of tiles
    mean = sum(total) / len(total)
    print(
        f"{rows}x{cols}: received tiles per rank mean {mean:.2f} max {max(total):.2f} "
        f"lower bound {bound:.2f}; most sent in a step {worst:.2f} tiles"
    )
    assert worst <= 2.0
    assert mean <= bound + 1.01


def test_received_tiles_on_2x2() -> None:
    got = []
    for rank in range(4):
        layout = PairLayout(64, 2, 2, rank)
        tile = volume(layout.tile_box()) * 128
        made = triangle_multiplication_plan(layout, 128, True, 4, "direct")
        got.append(made.elements()[1] / tile)
    assert sum(got) / 4 == 2.5
    assert max(got) == 3.0


def test_ring_takes_from_the_last_user() -> None:
    n = 3
    for rank in range(n * n):
        layout = PairLayout(n * n, n, n, rank)
        made = triangle_multiplication_plan(layout, 1, True, 1, "ring")
        for s in made.steps[1:]:
            assert all(p.held >= 0 for p in s.recvs)


def test_boxes() -> None:
    a: Box = ((0, 4), (2, 6))
    assert intersect(a, ((3, 9), (0, 3))) == ((3, 4), (2, 3))
    assert intersect(a, ((4, 9), (0, 3))) is None


def test_layout_errors() -> None:
    with pytest.raises(ValueError, match="outside the mesh 2x2"):
        PairLayout(5, 2, 2, 4)

    class Tile:
        shape, ndim = (1, 64, 60, 128), 4

    with pytest.raises(ValueError, match=r"\[1, 64, 60, 128\].*N=500.*2x4.*\[1, 252, 126, 128\]"):
        PairLayout(500, 2, 4, 0).check(Tile())
