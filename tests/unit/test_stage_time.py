"""The time model: it counts the products that Boltz has, its seconds follow from them."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from bench import stage_time as bench
from foldcp.layout.strategies import ATTENTION, MULTIPLICATION
from foldcp.planner.dims import BOLTZ1, BOLTZ2, dims_of
from foldcp.planner.rates import CPU, H100, H200, HOPPER, ONE_MACHINE, TENSOR, Chip
from foldcp.planner.stage_time import (
    ASSUMED,
    STAGES,
    KernelRates,
    StageSeconds,
    assumptions,
    diffusion,
    read_rates,
    shared,
    stage_seconds,
    trunk,
)
from foldcp.planner.stage_time.kernel_rates import KERNELS
from foldcp.planner.stage_time.parts import Case, Part
from foldcp.planner.workload import Setup, Workload

# A chip whose seconds are TFLOP of products, over TENSOR.
COUNTS = Chip("counts products", 1, 1, 1e30, 1e30, "", host=0.0, asynchronous=False)
INPUT = Workload(2048, 16384, 1024, 1, 5)


def modelled(given: Workload, rows: int, cols: int, chip: Chip = H100) -> dict[str, StageSeconds]:
    """Stages on GPUs with the strategies that they take."""
    return stage_seconds(given, bench.setup_of(given.tokens, rows, cols), chip, HOPPER)


def total(found: Mapping[str, StageSeconds]) -> float:
    """Seconds of all stages."""
    return sum(s.total_s for s in found.values())


def test_products_are_those_of_boltz() -> None:
    # TFLOP of Boltz-2 at 3,605 tokens, 4 passes, 200 steps, one sample, 1,024 rows of an alignment,
    # as counted in Boltz's own modules.
    case = Case(Workload(3605, 28840, 1024), Setup(1, 1), BOLTZ2, COUNTS, ONE_MACHINE, ASSUMED)
    passes = 4
    blocks, msa = passes * BOLTZ2.pairformer_blocks, passes * BOLTZ2.msa_blocks
    counted: dict[float, Part] = {
        13_379: blocks * case.triangle(ATTENTION, "panel-direct", 128),
        7_449: blocks * case.triangle(MULTIPLICATION, "panel-direct", 128),
        1_308: blocks * trunk.transition(case, case.tile, 128, 4, 2),
        1_383: msa * trunk.pair_block(case, 128),
        491: msa * trunk.outer_product(case, 1024),
        115: msa * trunk.averaging(case, 1024),
        580: 200 * BOLTZ2.token_layers * diffusion.token_layer(case, 1),
    }
    for tflop, part in counted.items():
        assert part.compute_s * TENSOR == pytest.approx(tflop, rel=0.005)
    stages = stage_seconds(case.workload, case.setup, COUNTS, ONE_MACHINE)
    assert stages["confidence"].compute_s * TENSOR == pytest.approx(695, rel=0.005)
    # Without templates, and atoms that are projected once where Boltz projects them by window.
    assert total(stages) * TENSOR == pytest.approx(26_115 - 520 - 113, rel=0.002)


def test_the_host_is_as_counted_on_fake_gpus() -> None:
    table = bench.ROOT / "bench" / "results" / "host" / "host_time.csv"
    with table.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["state"] == "this"]
    assert rows
    for row in rows:
        n, (r, c) = int(row["tokens"]), map(int, row["mesh"].split("x"))
        setup = bench.setup_of(n, r, c)
        case = Case(Workload(n, 8 * n, 1, 0, 5), setup, BOLTZ2, H100, HOPPER, ASSUMED)
        block = row["part"] == "pairformer_block"
        part = trunk.pairformer(case, 1) if block else diffusion.score(case, 5)
        # What a driver and NCCL take is assumed, as in foldcp/planner/rates.py.
        launches = int(row["triton_launches"]) + int(row["torch_launches"])
        beside = 40e-6 * int(row["groups"]) + 2e-6 * int(row["transfers"]) + 5e-6 * launches
        measured = float(row["host_ms"]) / 1e3 + beside
        assert 0.6 < case.seconds(part).host_s / measured < 2.1, row


def test_seconds_add_up_and_hide() -> None:
    for rows, cols in ((1, 1), (2, 2), (2, 4)):
        found = modelled(INPUT, rows, cols)
        assert tuple(found) == STAGES
        for name, s in found.items():
            device = s.compute_s + s.exposed_s
            recorded = rows * cols == 1 and name == "sampling"
            assert s.total_s == max(device, s.host_s), name
            assert (s.host_s == 0) == recorded, name
            assert 0 <= s.hidden <= 1 and s.exposed_s <= s.transfer_s
            assert (s.received_bytes > 0) == (s.transfer_s > 0), name
        moved = sum(s.received_bytes for s in found.values())
        assert (moved > 0) == (rows * cols > 1)
    on_cpu = stage_seconds(INPUT, Setup(2, 2, itemsize=4), CPU, ONE_MACHINE)
    for s in on_cpu.values():
        assert s.total_s == pytest.approx(s.compute_s + s.exposed_s + s.host_s)


def test_time_falls_with_ranks_and_grows_with_the_input() -> None:
    meshes = ((1, 1), (2, 2), (2, 4), (4, 4))
    large = replace(INPUT, tokens=8192, atoms=65536)
    assert all(a > 1.3 * b for a, b in pairwise(total(modelled(large, *m)) for m in meshes))
    for field, values in {
        "tokens": (512, 1024, 1536, 3605),
        "samples": (1, 2, 5),
        "sequences": (1, 256, 1024),
        "templates": (0, 1, 3),
        "recycling_steps": (0, 1, 3),
        "sampling_steps": (20, 200),
    }.items():
        found = [total(modelled(replace(INPUT, **{field: x}), 2, 2)) for x in values]
        assert all(a < b for a, b in pairwise(found)), (field, found)
    alone, together = (
        modelled(replace(INPUT, parallel_samples=n), 2, 2)["sampling"] for n in (1, 5)
    )
    assert alone.total_s > together.total_s
    # Rows beyond those that the module takes cost nothing.
    assert modelled(replace(INPUT, sequences=4096), 2, 2) == modelled(INPUT, 2, 2)


def test_small_inputs_wait_for_the_host_unless_it_replays() -> None:
    small = Workload(200, 1600, 64, 0, 1)
    one, four = modelled(small, 1, 1), modelled(small, 2, 2)
    assert four["sampling"].total_s == four["sampling"].host_s
    assert one["sampling"].total_s < four["sampling"].total_s / 3


def test_boltz1_repeats_the_trunk_in_float32() -> None:
    assert dims_of("boltz1") is BOLTZ1
    setup = replace(bench.setup_of(2048, 2, 2), itemsize=4)
    one, two = (
        stage_seconds(replace(INPUT, model=name), setup, H100, HOPPER)
        for name in ("boltz1", "boltz2")
    )
    assert one["templates"].total_s == 0 < two["templates"].total_s
    assert one["pairformer"].compute_s == pytest.approx(0.75 * two["pairformer"].compute_s)
    assert one["confidence"].compute_s > 5 * two["confidence"].compute_s
    with pytest.raises(ValueError, match="`model` is 'boltz3'; use one of boltz2, boltz1"):
        dims_of("boltz3")


def test_the_published_complex() -> None:
    given = bench.complex_of()
    assert given.tokens == 3605
    seconds = {
        (chip.name, r * c): total(modelled(given, r, c, chip)) for chip, r, c in bench.MACHINES
    }
    # Fold-CP: five samples in under 300 s on 4 x H100. All kernels at the assumed fractions, at
    # best a tenth of that.
    assert bench.PUBLISHED_S / 10 < seconds["H100", 4] < bench.PUBLISHED_S
    assert seconds["H200", 1] > 2.5 * seconds["H100", 4] > 3.5 * seconds["H100", 8]
    slow = KernelRates(dict.fromkeys(KERNELS, 0.1))
    setup = bench.setup_of(3605, 2, 2)
    assert total(stage_seconds(given, setup, H100, HOPPER, slow)) < 1.1 * bench.PUBLISHED_S


def test_measured_rates_replace_assumed_ones(tmp_path: Path) -> None:
    path = tmp_path / "rates.csv"
    path.write_text(
        "kernel,fraction,seconds,flops,bytes,exps,itemsize,machine\n"
        "triangle_attention,0.2,,,,,,a GPU\n"
        f"transition,,2,{H100.tflops * 1e12},,,2,a GPU\n"
        "link,0.4,,,,,,a GPU\nhost,2,,,,,,a GPU\n"
    )
    rates = read_rates(path, H100)
    assert rates.fractions == pytest.approx(
        {"triangle_attention": 0.2, "transition": 0.5, "link": 0.4, "host": 2.0}
    )
    setup = bench.setup_of(2048, 2, 2)
    before = stage_seconds(INPUT, setup, H100, HOPPER)["pairformer"]
    after = stage_seconds(INPUT, setup, H100, HOPPER, rates)["pairformer"]
    assert after.compute_s > 1.5 * before.compute_s
    assert after.host_s == pytest.approx(2 * before.host_s)
    assert after.transfer_s > 1.5 * before.transfer_s
    said = "\n".join(assumptions(H100, HOPPER, setup, rates))
    assert f"triangle_attention: 0.2 of the stated rates ({path})" in said
    assert "outer_product_mean: 0.8 of products, 0.8 of memory" in said and "assumed" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no rates"),
        ("kernel,fraction\nwarp,0.5\n", "line 2: kernel 'warp' is not one of triangle_mult"),
        ("kernel,fraction\nlinear,-1\n", "line 2: give a positive `fraction`"),
        ("kernel,seconds,flops\nlinear,0,1\n", "or `seconds` with `flops`"),
        ("kernel,seconds\nlink,3\n", "positive `fraction` of the stated rates$"),
        ("kernel,fraction\nlinear,much\n", "line 2: give a positive"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "rates.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_rates(path, H100)


def test_a_missing_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read rates from .*; check the path"):
        read_rates(tmp_path / "none.csv", H100)


def test_ranks_share_cores() -> None:
    chip, links = shared(CPU, ONE_MACHINE, 4, 2)
    assert chip.tflops == CPU.tflops / 2 and chip.host == 2 * CPU.host
    assert links.near.gbs == ONE_MACHINE.near.gbs / 2
    assert shared(CPU, ONE_MACHINE, 2, 4) == (CPU, ONE_MACHINE)


def test_a_fit_finds_the_rates_that_made_the_seconds() -> None:
    truth = KernelRates(
        {name: 0.3 + 0.1 * i for i, name in enumerate(KERNELS)} | {"link": 0.3, "host": 2.0}
    )
    measured = {run: bench.items(*run, truth, 2) for run in bench.FITTED}
    rates = bench.fit(measured, 2)
    for run in bench.PREDICTED:
        found, made = (bench.items(*run, x, 2)["total"] for x in (rates, truth))
        assert found == pytest.approx(made, rel=0.05)


def test_the_validation_on_cpu_holds() -> None:
    with bench.VALIDATED.open(newline="") as file:
        rows = list(csv.DictReader(file))
    totals = [row for row in rows if row["item"] == "total" and row["role"] == "predicted"]
    assert len(totals) == len({(row["tokens"], row["mesh"]) for row in totals}) == 3
    for row in totals:
        error = float(row["modelled_s"]) / float(row["core_s"]) - 1
        assert abs(error) < bench.AT_MOST, row
        assert error == pytest.approx(float(row["error"]), abs=0.002)


def test_h200_has_the_memory_of_its_own() -> None:
    one = [modelled(INPUT, 1, 1, chip)["recycling"].compute_s for chip in (H100, H200)]
    assert one[0] > 1.3 * one[1]
