"""Bytes of each stage: the formula of the planner, of which the exact count is the judge."""

from __future__ import annotations

from dataclasses import replace

import pytest

from foldcp.boltz.families.dry_run.arguments import hyperparameters
from foldcp.boltz.families.dry_run.measure import exact_stage_bytes
from foldcp.layout.strategies import ATTENTION, MULTIPLICATION, Sizes
from foldcp.layout.tiles import PairLayout
from foldcp.planner.choice import cheapest
from foldcp.planner.dims import dims_of
from foldcp.planner.stage_memory import STAGES, peak_bytes, stage_bytes, weights_bytes
from foldcp.planner.workload import Setup, Workload

PEAK, STAGE = 0.05, 0.10
SMALL_TILE = 0.07  # tiles of less than about 1,000 tokens a side, see `stage_memory.terms`
LARGE = ("msa", "pairformer", "conditioning", "sampling", "confidence")


def auto(workload: Workload, rows: int, cols: int, memory: str) -> Setup:
    """Return the strategies that `auto` takes."""
    e = 2 if workload.model == "boltz2" else 4
    padded = PairLayout(workload.tokens, rows, cols, 0, 16).padded
    sizes = Sizes(4, e, lean=memory == "lean")
    names = [
        cheapest(op, padded, (rows, cols), "direct", sizes) for op in (MULTIPLICATION, ATTENTION)
    ]
    names = names if rows * cols > 1 else ["panel-direct"] * 2
    return Setup(rows, cols, memory, *names, itemsize=e)


# tokens, atoms of each, rows of the alignment, samples, mesh, rank, memory, model
CASES = [
    (1024, 8, 1, 5, (1, 1), 0, "fast", "boltz2"),
    (1024, 20, 8192, 1, (2, 2), 1, "lean", "boltz2"),
    (1536, 8, 1024, 1, (2, 3), 3, "fast", "boltz2"),
    (2048, 8, 1024, 1, (4, 4), 10, "fast", "boltz2"),
    (1024, 20, 1024, 5, (2, 2), 1, "fast", "boltz1"),
    (1000, 8, 1024, 1, (1, 2), 0, "lean", "boltz2"),
]


@pytest.mark.boltz
@pytest.mark.parametrize("n,each,rows,samples,mesh,rank,memory,model", CASES)
def test_the_formula_is_the_exact_count(
    n: int, each: int, rows: int, samples: int, mesh: tuple, rank: int, memory: str, model: str
) -> None:
    workload = Workload(n, each * n, rows, 0, samples, model=model)
    setup = auto(workload, *mesh, memory)
    exact = exact_stage_bytes(workload, setup, rank)
    found = stage_bytes(workload, setup, rank)
    bound = SMALL_TILE if n == 1000 else PEAK
    assert max(found.values()) == pytest.approx(max(exact.values()), rel=bound)
    off = {k: round(found[k] / exact[k] - 1, 3) for k in LARGE}
    assert all(abs(x) <= STAGE for x in off.values()), off


def test_the_worst_rank_is_no_better_than_any() -> None:
    workload = Workload(3605, 28840, 1024, 0, 5)
    setup = auto(workload, 2, 4, "fast")
    worst = stage_bytes(workload, setup)
    assert tuple(worst) == STAGES
    each = [stage_bytes(workload, setup, rank) for rank in range(setup.size)]
    assert worst == {name: max(x[name] for x in each) for name in STAGES}
    assert peak_bytes(workload, setup) == max(worst.values()) + weights_bytes("boltz2")
    with pytest.raises(ValueError, match="rank"):
        stage_bytes(workload, setup, 8)
    with pytest.raises(ValueError, match="boltz3"):
        stage_bytes(replace(workload, model="boltz3"), setup)


def test_bytes_fall_with_the_ranks_and_with_bfloat16_z() -> None:
    workload = Workload(8192, 65536, 1024)
    pairs = 8192**2 / 16
    wide = auto(workload, 4, 4, "lean")
    narrow = replace(wide, z_itemsize=2)
    of_wide, of_narrow = (max(stage_bytes(workload, s).values()) for s in (wide, narrow))
    assert of_wide / pairs < 1000 + 2**30 / pairs
    assert of_narrow < of_wide


@pytest.mark.boltz
@pytest.mark.parametrize("model", ["boltz2", "boltz1"])
def test_the_planner_counts_with_the_sizes_of_the_models(model: str) -> None:
    stock, dims = hyperparameters("real", model), dims_of(model)
    score, msa, pairs = (stock[f"{x}_args"] for x in ("score_model", "msa", "pairformer"))
    expected = {name: stock[name] for name in ("token_s", "token_z", "atom_s", "atom_z")}
    expected |= {name: msa[name] for name in ("msa_s", "msa_blocks")}
    expected |= {
        "bins": stock["num_bins"], "queries": stock["atoms_per_window_queries"],
        "keys": stock["atoms_per_window_keys"], "pairformer_blocks": pairs["num_blocks"],
        "single_heads": pairs["num_heads"], "pair_heads": msa["pairwise_num_heads"],
        "head_width": msa["pairwise_head_width"], "atom_heads": score["atom_encoder_heads"],
        "token_layers": score["token_transformer_depth"],
        "token_heads": score["token_transformer_heads"],
        "atom_layers": score["atom_encoder_depth"],
        "conditioning_transitions": score["conditioning_transition_layers"],
    }  # fmt: skip
    if model == "boltz2":
        templates = stock["template_args"]
        expected |= {"template_z": templates["template_dim"]}
        expected |= {"template_blocks": templates["template_blocks"]}
        rated = stock["confidence_model_args"]["pairformer_args"]
        expected |= {"confidence_blocks": rated["num_blocks"]}
    assert {name: getattr(dims, name) for name in expected} == expected
