"""The cost model: its bytes are those of the plans, its choice is the cheapest and every rank's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch

from bench import roofline
from bench.synthetic.mesh import fake_mesh
from foldcp.fabric.policy import STRATEGIES
from foldcp.layout import triangle_plans as plans
from foldcp.layout.plans import chunks
from foldcp.layout.schedule import Plan, volume
from foldcp.layout.tiles import PairLayout
from foldcp.planner import rates
from foldcp.planner.choice import chunk_count, predict, received, strategy
from foldcp.planner.cost import ATTENTION, MULTIPLICATION, Sizes
from foldcp.planner.rates import BLACKWELL, CHIPS, H100, HOPPER, NDR, NVLINK4, PCIE4, Link, Links
from foldcp.planner.traffic import (
    Load,
    bias_loads,
    cannon_tiles,
    channel_loads,
    channel_widths,
    line_loads,
    panel_loads,
)
from foldcp.rings.channel_multiplication import channel_chunks

MESHES = [(r, q) for r in range(1, 17) for q in range(1, 17) if 1 < r * q <= 16]
CASES = [(op, name) for op, names in STRATEGIES.items() for name in names[1:]]
TILE = 128 * 2  # bytes of a pair of a or b in bf16


def parts(
    op: str, name: str, layout: PairLayout, s: Sizes, first: bool, count: int
) -> Iterator[tuple[Plan, tuple[int, ...]]]:
    """The plans of an op and the bytes of an element of each source."""
    route, e = name.removeprefix("panel-"), s.itemsize
    if name == "channel":
        for width in channel_widths(layout, s.channels, count):
            yield plans.channel_plan(layout, width, first), (e, e)
            yield plans.channel_back_plan(layout, width), (e,) * layout.size
    elif op == MULTIPLICATION:
        plan = plans.triangle_multiplication_plan(layout, s.channels, first, 1, route)
        yield plan, (e,) * len(plan.owned)
    elif name == "rows":
        for chunk in plans.line_chunks(layout, first, count):
            yield plans.rows_plan(layout, first, chunk, 1), (s.channels * e,)
            yield plans.rows_back_plan(layout, first, chunk), (s.channels * e,)
            plan = plans.rows_bias_plan(layout, first)
            yield plan, (s.heads * e,) * len(plan.owned)
    else:
        lines = layout.tile_rows if first else layout.tile_cols
        for chunk in chunks(lines, count):
            plan = plans.triangle_attention_plan(layout, first, chunk, route)
            panels = len(plan.owned) // 2
            yield plan, (2 * s.channels * e,) * panels + (s.heads * e,) * panels


@pytest.mark.parametrize(("op", "name"), CASES)
def test_bytes_are_those_of_the_plans(op: str, name: str) -> None:
    sizes = Sizes(channels=24)
    count = 1 if name == "panel-ring" else 2
    for (rows, cols), first in product(MESHES, (True, False)):
        size = rows * cols
        # Plans of rings take long to make: of large ones three ranks are compared.
        some = (0, size // 2, size - 1) if name == "panel-ring" and size > 6 else range(size)
        layouts = [PairLayout(2 * size, rows, cols, r) for r in some]
        modelled = received(op, name, layouts[0], sizes, first, count)
        for layout in layouts:
            planned = sum(
                volume(piece.box) * weights[piece.source]
                for plan, weights in parts(op, name, layout, sizes, first, count)
                for step in plan.steps
                for piece in step.recvs
            )
            assert modelled[layout.rank] == planned, (rows, cols, first, layout.rank)


def counted(plan: Plan, step: int, kinds: int, node: int) -> Load:
    """The load of a step of a plan."""
    elements = [[0] * 4 for _ in range(kinds)]
    messages = [set(), set()]
    for pieces, at in ((plan.steps[step].recvs, 0), (plan.steps[step].sends, 2)):
        for piece in pieces:
            far = piece.peer // node != plan.rank // node
            # Sources of one kind follow one another.
            kind = piece.source * kinds // len(plan.owned)
            elements[kind][at + far] += volume(piece.box)
            if at == 0:
                messages[far].add(piece.peer)
    return Load(tuple(tuple(k) for k in elements), (len(messages[0]), len(messages[1])))


@pytest.mark.parametrize("first", [True, False])
def test_loads_are_those_of_the_plans(first: bool) -> None:
    node = 3
    for rows, cols in ((1, 4), (2, 2), (2, 3), (3, 3), (2, 4), (4, 2)):
        size, mesh = rows * cols, (rows, cols, first)
        for rank in range(size):
            layout = PairLayout(size, rows, cols, rank)
            for route in ("direct", "ring"):
                plan = plans.triangle_multiplication_plan(layout, 1, first, 1, route)
                for step, load in enumerate(panel_loads(*mesh, route, node)):
                    expected = counted(plan, step, 2, node)
                    # The incoming update has its own lines in b, source 1.
                    kinds = expected.elements if first else expected.elements[::-1]
                    assert load[rank] == replace(expected, elements=kinds), (rows, cols, route)
            plan = plans.rows_bias_plan(layout, first)
            for step, load in enumerate(bias_loads(*mesh, node)):
                assert load[rank] == counted(plan, step, 1, node)
            (chunk,) = plans.line_chunks(layout, first, 1)
            lines = line_loads(*mesh, node)[rank]
            assert lines == counted(plans.rows_plan(layout, first, chunk, 1), 0, 1, node)
            assert lines == counted(plans.rows_back_plan(layout, first, chunk), 0, 1, node)
            # Units of channels are tiles, of one token per shard.
            there, back = (loads[rank] for loads in channel_loads(size, size + 1, node))
            plan = counted(plans.channel_plan(layout, size + 1, first), 0, 2, node)
            a_and_b = [sum(x) for x in zip(*plan.elements, strict=True)]
            assert [x * size for x in there.elements[0]] == a_and_b
            assert there.messages == plan.messages
            plan = counted(plans.channel_back_plan(layout, size + 1), 0, 1, node)
            assert tuple(x * size for x in back.elements[0]) == plan.elements[0]
            assert back.messages == plan.messages


def mean(name: str, size: int, op: str = MULTIPLICATION, n: int = 1024, wire: str = "raw") -> float:
    side = int(size**0.5)
    layout = PairLayout(n * side, side, side, 0)
    return predict(op, name, layout, Sizes(wire=wire)).received_bytes / (n * n)


def test_channels_move_less_the_more_ranks_there_are() -> None:
    share = {size: mean("channel", size) / mean("panel-direct", size) for size in (4, 16, 64)}
    assert share[4] == 2.25 / 2.5
    assert share[16] <= 0.45
    assert share[64] <= 0.2


def test_direct_panels_move_less_than_cannon() -> None:
    # By hand for 2x2: half the ranks transpose, two half-ranks skew, one shift of both.
    assert cannon_tiles(4) == (3.5, 5)
    assert cannon_tiles(16) == (8.25, 9)
    for size in (4, 16, 64, 256):
        assert mean("panel-direct", size) / TILE < cannon_tiles(size)[0]


@pytest.mark.parametrize(("op", "name"), CASES)
def test_fp8_moves_a_byte_per_element_and_its_scales(op: str, name: str) -> None:
    layout = PairLayout(1024, 2, 2, 0)
    # Attention in one chunk; its bias travels as it is.
    raw = sum(received(op, name, layout, Sizes(heads=0), count=1))
    fp8 = sum(received(op, name, layout, Sizes(heads=0, wire="fp8"), count=1))
    assert fp8 == raw * (33 / 32) / 2


def test_every_rank_chooses_the_same() -> None:
    for (rows, cols), op in product([(2, 2), (2, 3), (1, 4), (4, 4)], STRATEGIES):
        for n in (96, 3000):
            names = {
                strategy(op, PairLayout(n, rows, cols, r), fake_mesh(rows, cols, r, "meta"), 4, 2)
                for r in range(rows * cols)
            }
            assert len(names) == 1, (rows, cols, op, n, names)


@pytest.mark.parametrize("op", STRATEGIES)
@pytest.mark.parametrize("route", ["direct", "ring"])
def test_auto_is_the_cheapest(op: str, route: str) -> None:
    other = {MULTIPLICATION: "channel", ATTENTION: "rows"}[op]
    found = set()
    for shape, n in product([(1, 2), (2, 2), (4, 4), (8, 8), (16, 16)], (64, 1024, 4096)):
        layout = PairLayout(n * shape[1], *shape, 0)
        totals = {
            name: sum(predict(op, name, layout, first=first).total_s for first in (True, False))
            for name in (f"panel-{route}", other)
        }
        name = strategy(op, layout, fake_mesh(*shape, 0, "meta", route), 4, 2)
        assert totals[name] == min(totals.values()), (shape, n, totals)
        found.add(name)
    assert found == {f"panel-{route}", other}


def test_named_strategies_are_taken() -> None:
    for op, name in CASES:
        field = op.removeprefix("triangle_")
        for n in (64, 8192):
            mesh = fake_mesh(2, 2, 0, "meta", **{field: name})
            assert strategy(op, PairLayout(n, 2, 2, 0), mesh, 4, 2) == name
        assert strategy(op, PairLayout(n, 1, 1, 0), fake_mesh(1, 1), 4, 2) == "panel-direct"
    with pytest.raises(ValueError, match="`op` must be"):
        strategy("transition", PairLayout(64, 2, 2, 0), fake_mesh(2, 2, 0, "meta"), 4, 2)


@pytest.mark.parametrize(("op", "name"), CASES)
def test_what_is_faster_never_takes_longer(op: str, name: str) -> None:
    def totals(change: Callable[[float], Links]) -> list[float]:
        layout = PairLayout(4096, 4, 4, 0)
        return [predict(op, name, layout, links=change(x)).total_s for x in (0.25, 1, 4, 1e9)]

    near = totals(lambda x: Links(replace(NVLINK4, gbs=NVLINK4.gbs * x), NDR))
    far = totals(lambda x: Links(NVLINK4, replace(NDR, gbs=NDR.gbs * x)))
    prompt = totals(lambda x: Links(NVLINK4, replace(NDR, latency=NDR.latency / x)))
    for times in (near, far, prompt):
        assert all(a >= b for a, b in pairwise(times)), times
    assert far[0] > 1.1 * far[-1], "a mesh of two nodes uses the network"
    # With links that cost nothing, math and what packs for them is left.
    free = Links(Link("free", 1e12, 0), Link("free", 1e12, 0))
    chip = replace(H100, tbs=1e9, host=0)
    ideal = predict(op, name, PairLayout(4096, 4, 4, 0), chip=chip, links=free)
    assert ideal.total_s == pytest.approx(ideal.compute_s, rel=1e-6)


@pytest.mark.parametrize(("op", "name"), CASES)
def test_transfers_run_under_math(op: str, name: str) -> None:
    layout = PairLayout(8192, 2, 2, 0)
    p = predict(op, name, layout)
    assert 0 < p.exposed_s < 0.9 * p.transfer_s
    # Where the link is the limit, math hides instead: of panels all but what has no next step.
    slow = Link("slow", 1, 0)
    p = predict(op, name, layout, links=Links(slow, slow))
    hidden = p.transfer_s - p.exposed_s
    assert 0.2 * p.core_s < hidden <= p.core_s * (1 + 1e-9)


def test_attention_hides_its_transfers() -> None:
    # n = 1024 and more tokens per axis of a tile, 2x2 GPUs with NVLink 4.
    for n in (1024, 1536, 2048, 4096):
        layout = PairLayout(2 * n, 2, 2, 0)
        name = strategy(ATTENTION, layout, fake_mesh(2, 2, 0, "meta"), 4, 2)
        for first in (True, False):
            p = predict(ATTENTION, name, layout, first=first)
            assert p.efficiency >= 0.85, (n, name, p)
            assert p.exposed_s == pytest.approx(p.total_s - p.compute_s)
    # The bound means something: it does not hold over PCIe.
    slow = predict(ATTENTION, name, PairLayout(2048, 2, 2, 0), links=Links(PCIE4, NDR))
    assert slow.efficiency < 0.5


def test_chips_and_chunks_are_those_of_roofline_and_rings() -> None:
    for chip in (c for c in CHIPS if c.name in ("H100", "H200", "B200")):
        same = roofline.chip_named(chip.name)
        assert same is not None
        assert (chip.tflops, chip.float32_tflops, chip.tbs) == (
            same.tflops, same.float32_tflops, same.tbs
        )  # fmt: skip
        assert chip.gexps * 1e9 == pytest.approx(same.exp_rate())
    expected = {"memory": rates.MEMORY, "tensor": rates.TENSOR, "exp": rates.EXP}
    assert expected == roofline.EXPECTED
    assert HOPPER.node == BLACKWELL.node == 8
    for (rows, cols), n in product([(2, 2), (2, 3), (4, 4), (8, 8)], (96, 384, 1024, 4096)):
        layout = PairLayout(n * cols, rows, cols, 0)
        z = torch.empty(1, layout.tile_rows, layout.tile_cols, 128, device="meta")
        mesh = fake_mesh(rows, cols, 0, "meta")
        spans = [span for group in channel_chunks(z, 128, layout, mesh) for span in group]
        count = chunk_count(MULTIPLICATION, "channel", layout.padded, (rows, cols), Sizes(4, 4))
        assert tuple(hi - lo for lo, hi in spans) == channel_widths(layout, 128, count)


def test_chunks_cost_the_host() -> None:
    """Few chunks where the host says when an op ends, more where memory asks for them."""
    shape = (2, 4)
    for op, name in ((MULTIPLICATION, "channel"), (ATTENTION, "rows")):
        counts = [chunk_count(op, name, n, shape, Sizes()) for n in (512, 1024, 2048, 8192)]
        assert counts[0] == 1 and counts == sorted(counts), counts
        assert counts[2] <= 5 < counts[3], counts
    # A host that takes no time would rather have transfers hidden.
    for host, count in ((0, 2), (1, 1)):
        chip = replace(H100, host=host)
        assert chunk_count(ATTENTION, "rows", 1024, shape, Sizes(), chip) == count
    p = predict(MULTIPLICATION, "channel", PairLayout(2048, 2, 4, 0), chip=replace(H100, host=100))
    assert p.total_s == p.host_s > p.compute_s
