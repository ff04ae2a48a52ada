"""Peak memory of every stage on a fake GPU, as a regression test (see bench/live_memory.py).

At half the tokens of the published table and a quarter of the chunk's bytes, every N x N tensor
and every chunk of one is the same multiple of N^2; what grows with N alone weighs twice as much,
so the bounds here are the stricter ones.
"""

from __future__ import annotations

import pytest
import torch

from bench.live_memory import BYTES_PER_PAIR, SHARE_OF_2X2, TOKENS
from bench.mesh_memory import BESIDE, FLAT, SEQUENCES
from bench.mesh_memory import BYTES_PER_PAIR as BYTES_PER_PAIR_LEAN
from foldcp.boltz.families.dry_run.device import fake_cuda
from foldcp.boltz.families.dry_run.features import ATOMS_PER_TOKEN, features
from foldcp.boltz.families.dry_run.measure import measure
from foldcp.planner.dims import BOLTZ2
from foldcp.planner.stage_memory import terms
from foldcp.planner.stage_memory.terms import Case
from foldcp.planner.workload import Setup, Workload
from foldcp_kernels.core.chunking import chunk_bytes

N = TOKENS // 2
CHUNK = chunk_bytes(torch.device("cuda")) // 4


@pytest.fixture(scope="module", params=["torch", "triton"])
def whole(request: pytest.FixtureRequest) -> dict[str, float]:
    """Bytes x N^2 of each stage on one GPU."""
    found = measure(N, chunk=CHUNK, recycles=0, kernels=request.param)
    return {s.stage: s.per_pair for s in found} | {"kernels": request.param}


def test_one_gpu_stays_within_its_bytes(whole: dict[str, float]) -> None:
    whole = {stage: b for stage, b in whole.items() if stage != "kernels"}
    above = {stage: f"{b:.0f}" for stage, b in whole.items() if b > BYTES_PER_PAIR}
    assert not above, f"stages above {BYTES_PER_PAIR} bytes x N^2: {above}"


@pytest.mark.parametrize("rank", [1])
def test_a_quarter_of_it_on_each_of_four(whole: dict[str, float], rank: int) -> None:
    found = measure(N, 2, 2, rank, chunk=CHUNK, recycles=0, kernels=whole["kernels"])
    part = {s.stage: s.per_pair for s in found}
    share = part["overall"] / whole["overall"]
    assert share <= SHARE_OF_2X2, f"rank {rank} holds {share:.3f} of one GPU's peak: {part}"


# Small tiles, with chunks and what may live beside them made smaller alike.
@pytest.mark.parametrize("tokens,rows,cols", [(1024, 1, 1), (1024, 2, 2), (2048, 4, 4)])
def test_lean_memory_falls_with_the_ranks(tokens: int, rows: int, cols: int) -> None:
    pairs, beside = tokens**2 / (rows * cols), BESIDE // 8
    for memory in ("lean", "fast") if rows == 1 else ("lean",):
        found = measure(
            tokens, rows, cols, rows * cols - 1, sequences=SEQUENCES // 8, chunk=CHUNK // 4,
            recycles=0, kernels="triton", memory=memory,
        )  # fmt: skip
        above = {
            s.stage: f"{s.bytes / pairs:.0f}"
            for s in found
            if s.bytes > BYTES_PER_PAIR_LEAN * pairs + beside
        }
        if memory == "lean":
            assert not above, f"stages above {BYTES_PER_PAIR_LEAN} bytes of a pair: {above}"
        else:
            assert {"msa", "sampling"} <= set(above), "the bound is no bound"


def of_every_rank(n: int, sequences: int) -> Case:
    workload = Workload(n, n * ATOMS_PER_TOKEN, sequences)
    return Case(workload, Setup(2, 2), BOLTZ2, 0)


@pytest.mark.parametrize("tokens,sequences", [(64, 1), (64, 9), (203, 9)])
def test_features_have_the_bytes_of_their_formula(tokens: int, sequences: int) -> None:
    found = sum(x.numel() * x.element_size() for x in features(tokens, sequences).values())
    assert 0 <= found - terms.features(of_every_rank(tokens, sequences)) <= 64  # numbers


def test_what_every_rank_holds_fits_beside_its_pairs() -> None:
    for n, _, _ in FLAT:
        case = of_every_rank(n, SEQUENCES)
        assert terms.features(case) + terms.gathered_single(case) <= BESIDE // 2, n


def test_live_bytes_are_those_of_storages() -> None:
    with fake_cuda() as device:
        a = torch.empty(100, 10, device="cuda")
        b = a.view(1000)[:10]
        c = a @ torch.empty(10, 5, device="cuda")
        assert c.dtype == torch.bfloat16
        # a, and c; casts and the second factor are gone, views cost nothing.
        assert device.live.now == 4000 + 1000
        assert device.live.peak == 4000 + 200 + 2000 + 100 + 1000
        del a
        assert device.live.now == 5000
        del b, c
        assert device.live.now == 0


def test_known_values_follow_the_operators() -> None:
    with fake_cuda():
        x = torch.arange(6, device="cuda")
        x[2:4] += 10
        assert x.tolist() == [0, 1, 12, 13, 4, 5]
        assert x[x > 3].tolist() == [12, 13, 4, 5]
        y = x + torch.randint(3, (6,), device="cuda")
        with pytest.raises(RuntimeError, match="not known"):
            y.tolist()


def test_few_chunks_have_the_peak_of_all() -> None:
    every, few = (measure(64, few=few, chunk=16 << 20, recycles=0) for few in (False, True))
    assert [(s.stage, s.bytes) for s in few] == [(s.stage, s.bytes) for s in every]
