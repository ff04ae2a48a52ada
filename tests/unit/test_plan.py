"""What a plan is made for, what it chooses, and what it says would fit instead."""

from __future__ import annotations

from dataclasses import replace

import pytest

from foldcp.errors import UserError
from foldcp.planner import gpus
from foldcp.planner.gpus import GPUS, named, parse
from foldcp.planner.plan import of_setup, plan, remedies, setup_of, shapes
from foldcp.planner.workload import Workload

COMPLEX = Workload(3605, 28_000, 1024)


@pytest.mark.parametrize(
    ("text", "name", "gigabytes", "count", "node"),
    [
        ("1xrtx4090", "rtx4090", 24, 1, 1),
        ("8xh100-80", "h100", 80, 8, 8),
        ("4xa100-40", "a100", 40, 4, 4),
        ("4xA100-80GB", "a100", 80, 4, 4),
        ("2x8xh100-80", "h100", 80, 16, 8),
        ("4x4xb200", "b200", 180, 16, 4),
        ("64xb300", "b300", 288, 64, 8),
        ("RTX 4090", "rtx4090", 24, 1, 1),
    ],
)
def test_gpus_are_read(text: str, name: str, gigabytes: int, count: int, node: int) -> None:
    found = parse(text)
    assert (found.gpu.name, found.gpu.gigabytes) == (name, gigabytes)
    assert (found.count, found.node, found.memory) == (count, node, gigabytes * 10**9)
    assert found.links.node == node and found.links.near is found.gpu.near


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("8xh1000", "did you mean h100?"),
        ("2xrtx409", "did you mean rtx4090?"),
        ("8xa100-90", "use a100-40 or a100-80"),
        ("0xh100", "give 1 to 4096 GPUs"),
        ("-2xh100", "give 1 to 4096 GPUs"),
        ("99999xh100", "give 1 to 4096 GPUs"),
        ("8", "must be COUNTxNAME"),
        ("", "must be COUNTxNAME"),
    ],
)
def test_impossible_gpus_are_refused(text: str, says: str) -> None:
    with pytest.raises(UserError) as raised:
        parse(text)
    assert says in str(raised.value)
    if "COUNT" not in says and "give" not in says:
        assert all(gpu.label in str(raised.value) for gpu in GPUS), "the list"


def test_gpus_of_a_machine_are_found_by_their_names() -> None:
    for name, label in {
        "NVIDIA H100 80GB HBM3": "h100-80",
        "NVIDIA A100-SXM4-40GB": "a100-40",
        "NVIDIA A100-SXM4-80GB": "a100-80",
        "NVIDIA GeForce RTX 4090": "rtx4090-24",
        "NVIDIA L4": "l4-24",
        "NVIDIA L40S": "l40s-48",
        "NVIDIA RTX A5000": "a5000-24",
    }.items():
        found = named(name, 2, int(label.rpartition("-")[2]) * 2**30)
        assert found is not None and found.gpu.label == label, name
    assert named("Quadro T1000", 1, 2**32) is None


def test_the_fastest_setup_that_fits_is_chosen() -> None:
    cluster = parse("8xh100")
    best = plan(COMPLEX, cluster)
    assert best.fits and best.setup.size == 8
    for shape in shapes(8, COMPLEX.tokens):
        for memory in ("fast", "lean"):
            other = of_setup(COMPLEX, cluster, setup_of(COMPLEX, shape, memory))
            assert not other.fits or best.total_s <= other.total_s
    assert plan(replace(COMPLEX, tokens=60, atoms=500), cluster).setup.size == 1, "links cost"
    assert plan(COMPLEX, cluster, mesh="1x2").setup.size == 2
    assert set(best.seconds) == set(best.stages)


def test_lean_memory_is_taken_where_fast_does_not_fit() -> None:
    card = parse("1xh100")
    large = replace(COMPLEX, tokens=8000, atoms=64_000)
    assert plan(COMPLEX, card).setup.memory == "fast"
    found = plan(large, card)
    assert found.fits and found.setup.memory == "lean"
    assert not plan(large, card, memory="fast").fits


def test_remedies_fit_and_are_planned() -> None:
    large = replace(COMPLEX, tokens=12_000, atoms=96_000)
    found = plan(large, parse("2xrtx4090"))
    assert not found.fits and not found.seconds
    listed = remedies(found)
    assert listed and all(one.plan.fits for one in listed)
    more = next(one.plan for one in listed if "of these GPUs" in one.change)
    half = replace(more.cluster, count=more.cluster.count // 2)
    assert not plan(large, half).fits, "fewer do not"
    larger = next(one.plan for one in listed if "larger" in one.change)
    assert larger.cluster.count == 2 and larger.cluster.memory > found.cluster.memory
    fast = plan(replace(COMPLEX, tokens=8000, atoms=64_000), parse("h100"), memory="fast")
    assert remedies(fast, "fast")[0].change == "FOLDCP_MEMORY=lean"


@pytest.mark.parametrize(
    ("change", "mesh", "says"),
    [
        ({"tokens": 0}, "auto", "tokens must be at least 1, got 0"),
        ({"atoms": -4}, "auto", "atoms must be at least 1, got -4"),
        ({"sequences": 0}, "auto", "sequences must be at least 1, got 0"),
        ({}, "3x3", "needs 9 GPUs and there are 8"),
        ({}, "2by4", "auto or ROWSxCOLUMNS"),
        ({}, "0x4", "auto or ROWSxCOLUMNS"),
    ],
)
def test_impossible_sizes_are_refused(change: dict[str, int], mesh: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        plan(replace(COMPLEX, **change), parse("8xh100"), mesh=mesh)  # type: ignore[arg-type]


def test_rates_of_gpus_are_plausible() -> None:
    for gpu in GPUS:
        chip = gpu.chip
        assert (
            50 < chip.tflops < 3000 and 10 < chip.float32_tflops < 120 and "NVIDIA" in chip.source
        )
        assert 0.2 < chip.tbs < 10 and 1000 < chip.gexps < 10_000
    assert len({gpu.label for gpu in GPUS}) == len(GPUS) == 13
    assert gpus.MOST >= 256
