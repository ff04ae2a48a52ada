"""The cost model: its bytes are those of the plans, its choice is the cheapest and every rank's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch

from bench import roofline
from foldcp.boltz.families.dry_run.mesh import fake_mesh
from foldcp.fabric.policy import STRATEGIES
from foldcp.layout.boxes import volume
from foldcp.layout.cuts import LEAN_TILES, channel_widths, tiles_held
from foldcp.layout.schedule import Plan
from foldcp.layout.strategies import ATTENTION, MULTIPLICATION, Sizes, exchanges
from foldcp.layout.tiles import PairLayout
from foldcp.layout.volumes import Load, cannon_tiles, volumes
from foldcp.planner import choice, rates
from foldcp.planner.choice import (
    cheapest,
    chunk_count,
    estimate,
    fast_bytes,
    lean,
    received,
    strategy,
)
from foldcp.planner.job import CHUNK_BYTES, Estimate, Job
from foldcp.planner.rates import BLACKWELL, CHIPS, H100, HOPPER, NDR, NVLINK4, PCIE4, Link, Links
from foldcp.rings.channel_multiplication import channel_chunks
from foldcp_kernels.core.chunking import set_chunk_bytes

MESHES = [(r, q) for r in range(1, 17) for q in range(1, 17) if 1 < r * q <= 16]
CASES = [(op, name) for op, names in STRATEGIES.items() for name in names[1:]]
TILE = 128 * 2  # bytes of a pair of a or b in bf16


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
                volume(piece.box) * moved.wire[moved.kinds[piece.source]]
                for moved in exchanges(op, name, layout, sizes, first, count, CHUNK_BYTES)
                for step in moved.plan.steps
                for piece in step.recvs
            )
            assert modelled[layout.rank] == planned, (rows, cols, first, layout.rank)


def counted(plan: Plan, step: int, kinds: tuple[int, ...], node: int) -> Load:
    """The load of a step of a plan."""
    elements = [[0] * 4 for _ in range(max(kinds) + 1)]
    messages = [set(), set()]
    for pieces, at in ((plan.steps[step].recvs, 0), (plan.steps[step].sends, 2)):
        for piece in pieces:
            far = piece.peer // node != plan.rank // node
            elements[kinds[piece.source]][at + far] += volume(piece.box)
            if at == 0:
                messages[far].add(piece.peer)
    return Load(tuple(tuple(k) for k in elements), (len(messages[0]), len(messages[1])))


@pytest.mark.parametrize(("op", "name"), CASES)
def test_loads_are_those_of_the_plans(op: str, name: str) -> None:
    """Of every rank, step and exchange: what the model prices is what a rank's own plan says."""
    node, sizes = 3, Sizes(channels=7)
    for (rows, cols), first in product(((1, 4), (2, 2), (2, 3), (3, 3), (2, 4)), (True, False)):
        size = rows * cols
        given = sizes, first, 2, CHUNK_BYTES
        of_ranks = [
            list(exchanges(op, name, PairLayout(2 * size, rows, cols, rank), *given))
            for rank in range(size)
        ]
        for moves in zip(*of_ranks, strict=True):
            for step, load in enumerate(volumes(moves[0].plan.schedule, moves[0].kinds, node)):
                expected = [counted(x.plan, step, x.kinds, node) for x in moves]
                assert list(load) == expected, (rows, cols, first, step)


def mean(name: str, size: int, op: str = MULTIPLICATION, n: int = 1024, wire: str = "raw") -> float:
    side = int(size**0.5)
    layout = PairLayout(n * side, side, side, 0)
    return estimate(op, name, layout, Sizes(wire=wire)).received_bytes / (n * n)


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


@pytest.mark.parametrize("name", STRATEGIES[MULTIPLICATION][1:])
@pytest.mark.parametrize("wire", ["raw", "fp8"])
def test_fp8_planes_move_a_byte_per_element(name: str, wire: str) -> None:
    """Whatever the wire is; the products that go back from channels travel by it."""
    layout = PairLayout(480, 2, 3, 0)
    low = Sizes(wire=wire, contraction="fp8")
    plain = received(MULTIPLICATION, name, layout, Sizes(), count=4)
    back = low.travels(low.itemsize) / 2 if name == "channel" else 0
    part = (2 * 0.5 + back) / 3 if name == "channel" else 0.5
    found = received(MULTIPLICATION, name, layout, low, count=4)
    for mine, theirs in zip(found, plain, strict=True):
        assert mine == pytest.approx(part * theirs, rel=0.03)
    fast, slow = (
        estimate(MULTIPLICATION, name, layout, x, count=4)
        for x in (replace(low, wire="raw"), Sizes())
    )
    assert fast.core_s < slow.core_s and fast.transfer_s < slow.transfer_s


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
            name: sum(estimate(op, name, layout, first=first).total_s for first in (True, False))
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
        return [estimate(op, name, layout, links=change(x)).total_s for x in (0.25, 1, 4, 1e9)]

    near = totals(lambda x: Links(replace(NVLINK4, gbs=NVLINK4.gbs * x), NDR))
    far = totals(lambda x: Links(NVLINK4, replace(NDR, gbs=NDR.gbs * x)))
    prompt = totals(lambda x: Links(NVLINK4, replace(NDR, latency=NDR.latency / x)))
    for times in (near, far, prompt):
        assert all(a >= b for a, b in pairwise(times)), times
    assert far[0] > 1.1 * far[-1], "a mesh of two nodes uses the network"
    # With links that cost nothing, math and what packs for them is left.
    free = Links(Link("free", 1e12, 0), Link("free", 1e12, 0))
    chip = replace(H100, tbs=1e9, host=0)
    ideal = estimate(op, name, PairLayout(4096, 4, 4, 0), chip=chip, links=free)
    assert ideal.total_s == pytest.approx(ideal.compute_s, rel=1e-6)


@pytest.mark.parametrize(("op", "name"), CASES)
def test_transfers_run_under_math(op: str, name: str) -> None:
    layout = PairLayout(8192, 2, 2, 0)
    p = estimate(op, name, layout)
    assert 0 < p.exposed_s < 0.9 * p.transfer_s
    # Where the link is the limit, math hides instead: of panels all but what has no next step.
    slow = Link("slow", 1, 0)
    p = estimate(op, name, layout, links=Links(slow, slow))
    hidden = p.transfer_s - p.exposed_s
    assert 0.2 * p.core_s < hidden <= p.core_s * (1 + 1e-9)


def test_attention_hides_its_transfers() -> None:
    # n = 1024 and more tokens per axis of a tile, 2x2 GPUs with NVLink 4.
    for n in (1024, 1536, 2048, 4096):
        layout = PairLayout(2 * n, 2, 2, 0)
        name = strategy(ATTENTION, layout, fake_mesh(2, 2, 0, "meta"), 4, 2)
        for first in (True, False):
            p = estimate(ATTENTION, name, layout, first=first)
            assert p.efficiency >= 0.85, (n, name, p)
            assert p.exposed_s == pytest.approx(p.total_s - p.compute_s)
    # The bound means something: it does not hold over PCIe.
    slow = estimate(ATTENTION, name, PairLayout(2048, 2, 2, 0), links=Links(PCIE4, NDR))
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
    p = estimate(MULTIPLICATION, "channel", PairLayout(2048, 2, 4, 0), chip=replace(H100, host=100))
    assert p.total_s == p.host_s > p.compute_s


def test_the_model_prices_the_run_that_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """FOLDCP_CHUNK_MB changes how a ring cuts panels, and so what each strategy costs."""
    priced: list[int] = []
    done = Job.done

    def recorded(job: Job, rank: int, loads: Any, times: int, *rest: Any) -> Estimate:
        priced.append(times * len(loads))
        return done(job, rank, loads, times, *rest)

    monkeypatch.setattr(Job, "done", recorded)
    layout, steps = PairLayout(2048, 2, 2, 0), {}
    for megabytes in (8, 32, 256, 1024):
        largest = megabytes * 10**6
        for name in ("panel-direct", "panel-ring"):
            priced.clear()
            estimate(MULTIPLICATION, name, layout, chunk_bytes=largest)
            planned = exchanges(MULTIPLICATION, name, layout, Sizes(), True, 1, largest)
            steps[megabytes] = sum(len(x.plan.steps) for x in planned)
            assert set(priced) == {steps[megabytes]}, (megabytes, name)
    assert steps[8] == steps[32] > steps[256] > steps[1024]
    asked: list[int] = []
    monkeypatch.setattr(choice, "cheapest", lambda *args: asked.append(args[-1]) or "channel")
    set_chunk_bytes(12_345_678)
    try:
        strategy(MULTIPLICATION, layout, fake_mesh(2, 2, 0, "meta"), 4, 2)
    finally:
        set_chunk_bytes(None)
    assert asked == [12_345_678]


@pytest.mark.parametrize("shape", [(2, 2), (2, 4), (4, 4), (8, 8), (16, 16)], ids=str)
def test_lean_memory_takes_no_strategy_that_holds_more(shape: tuple[int, int]) -> None:
    n = 2048 * shape[1]
    layout, sizes, held = PairLayout(n, *shape, 0), Sizes(lean=True), []
    for op in STRATEGIES:
        fast, name = (cheapest(op, n, shape, "direct", s) for s in (Sizes(), sizes))
        for taken, s in ((fast, Sizes()), (name, sizes)):
            if taken in ("channel", "rows"):
                held.append(
                    (s.lean, tiles_held(taken, layout, chunk_count(op, taken, n, shape, s)))
                )
    assert all(tiles <= LEAN_TILES for is_lean, tiles in held if is_lean)
    if shape[0] >= 8:
        assert any(tiles > LEAN_TILES for is_lean, tiles in held if not is_lean)


def test_auto_memory_is_lean_where_fast_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, gib = PairLayout(8192, 4, 4, 0), 1 << 30
    need = fast_bytes(8192, (4, 4), "direct")
    assert 8 * gib < need < 24 * gib < fast_bytes(8192, (1, 1), "direct")
    for there, expected in ((None, False), (need - 1, True), (need, False)):
        monkeypatch.setattr(choice, "device_bytes", lambda _, there=there: there)
        assert lean(layout, fake_mesh(4, 4)) is expected
        assert lean(layout, fake_mesh(4, 4, memory="lean"))
        assert not lean(layout, fake_mesh(4, 4, memory="fast"))
