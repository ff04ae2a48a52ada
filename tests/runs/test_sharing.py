"""Data-parallel groups: inputs shared out evenly, results identical to folding one by one."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import parity
import pytest
import torch
from forked import Case, Ended, run_cases

from foldcp.boltz.families.swap import apply
from foldcp.fabric.mesh import Mesh
from foldcp.layout.mesh_shape import group_size
from foldcp.runtime import sharing

FAST = "--accelerator cpu --sampling_steps 4 --recycling_steps 1 --seed 1 --diffusion_samples 2"
SEQUENCE = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEG"
LENGTHS = {"p1": 18, "p2": 7, "p3": 30, "p4": 11, "p5": 22}


def test_no_group_has_much_more_than_the_best_sharing_gives_it() -> None:
    draw = random.Random(0)
    for groups, count in itertools.product((2, 3), (1, 4, 7)):
        sizes = [draw.randrange(50, 2000) for _ in range(count)]
        work = [sharing.cost(n) for n in sizes]

        def largest(owner: Any, groups: int = groups, work: list[float] = work) -> float:
            return max(
                sum(w for w, g in zip(work, owner, strict=True) if g == group)
                for group in range(groups)
            )

        best = min(largest(owner) for owner in itertools.product(range(groups), repeat=count))
        assert largest(sharing.assign(sizes, groups)) <= 4 / 3 * best + 1e-9


def test_ranks_must_share_out_evenly() -> None:
    assert group_size(8, 2) == 4
    with pytest.raises(ValueError, match="FOLDCP_DP=3 groups need a multiple of 3 ranks.* divisor"):
        group_size(4, 3)


STEERED = {"fk_steering": True, "physical_guidance_update": True, "num_gd_steps": 1}


@pytest.mark.parametrize(
    ("name", "steering", "subsample"),
    [("ubiquitin", {}, False), ("heterodimer", {}, True), ("tetramer", STEERED, False)],
)
def test_replay_draws_what_folding_draws(
    prepared: Any, name: str, steering: dict[str, Any], subsample: bool
) -> None:
    feats = parity.compact_features(prepared(name))
    model = parity.build_model(steering=steering)
    model.msa_module.subsample_msa, model.msa_module.num_subsampled_msa = subsample, 2
    apply(model, Mesh.create(1, 1))
    parity.set_predict_args(model, recycling=1, steps=20, samples=2)
    torch.manual_seed(0)
    model.predict_step(dict(feats), 0)
    folded = torch.get_rng_state()
    torch.manual_seed(0)
    model.predict_step.replay(feats)
    assert torch.equal(torch.get_rng_state(), folded)


def _write(folder: Path) -> None:
    (folder / "many").mkdir()
    for name, length in LENGTHS.items():
        text = f"  - protein: {{id: A, sequence: {SEQUENCE[:length]}, msa: empty}}\n"
        text += {"p2": "  - ligand: {id: B, ccd: MG}\n"}.get(name, "")
        text += {"p4": "  - ligand: {id: C, smiles: 'CCO'}\n"}.get(name, "")
        (folder / "many" / f"{name}.yaml").write_text("version: 1\nsequences:\n" + text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharing")


@pytest.fixture(scope="module")
def ends(folder: Path, small_cache: Path) -> dict[str, Ended]:
    _write(folder)

    def predict(out: str, workers: int) -> list[str]:
        places = ["--out_dir", str(folder / out), "--cache", str(small_cache)]
        return ["predict", str(folder / "many"), *FAST.split(), *places,
                "--num_workers", str(workers)]  # fmt: skip

    two = {"FOLDCP_DP": "2"}
    return run_cases({
        "one by one": Case(predict("one", 0), 2, rig="real"),
        "two at once": Case(predict("two", 0), 4, two, rig="real"),
        "alone": Case(predict("alone", 1), rig="real"),
        "workers": Case(predict("workers", 1), 3, {"FOLDCP_DP": "3"}, rig="real"),
        "uneven": Case(predict("uneven", 0), 3, two, rig="real"),
        "memory": Case(predict("memory", 0), 4, two, rig="at trunk oom 3 0"),
    })  # fmt: skip


def _same(one: Path, other: Path) -> None:
    def files(path: Path) -> dict[str, Path]:
        found = (path / "boltz_results_many" / "predictions").glob("*/*")
        return {f"{p.parent.name}/{p.name}": p for p in found}

    mine, theirs = files(one), files(other)
    assert mine.keys() == theirs.keys() and len(mine) == 10 * len(LENGTHS)
    for name, path in mine.items():
        if path.suffix == ".npz":
            with np.load(path) as a, np.load(theirs[name]) as b:
                assert all(np.array_equal(a[key], b[key]) for key in a), name
        else:
            assert path.read_text() == theirs[name].read_text(), name


def test_results_are_those_of_one_by_one(folder: Path, ends: dict[str, Ended]) -> None:
    for name in ("one by one", "two at once", "alone", "workers"):
        assert set(ends[name].codes) == {0}, ends[name]
    _same(folder / "one", folder / "two")
    _same(folder / "alone", folder / "workers")


def test_what_goes_wrong_in_one_group_is_told(folder: Path, ends: dict[str, Ended]) -> None:
    (message,) = ends["uneven"].messages()
    assert "FOLDCP_DP=2 groups need a multiple of 2 ranks, but 3 were started" in message
    (message,) = ends["memory"].messages()
    assert "1 input(s) could not be folded: p" in message and "rank 1 in recycle 1/2" in message
    assert set(ends["memory"].codes) == {1}
    written = list((folder / "memory").glob("boltz_results_many/predictions/*/*_model_0.cif"))
    assert len(written) == len(LENGTHS) - 1
