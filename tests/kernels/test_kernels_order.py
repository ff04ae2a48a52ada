"""The order of attention's programs, what that makes device memory move, and which blocks win."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from itertools import product

import pytest
import torch
import triton
import triton.language as tl
from kernel_checks import DEVICE, check
from torch import Tensor

from bench import aot, l2, occupancy, roofline
from foldcp_kernels.attention import attend
from foldcp_kernels.attention import fused as attention
from foldcp_kernels.attention import fused_backward as attention_backward
from foldcp_kernels.attention.order import place_program
from foldcp_kernels.core import triton_configs as configs
from foldcp_kernels.core.triton_launch import INTERPRETED, capability

SHAPES = [(1, 1, 1, 12), (5, 3, 7, 4), (3, 2, 3, 8), (2, 2, 8, 4), (4, 1, 5, 1), (2, 5, 13, 12)]


@triton.jit
def _write_places(p_out, blocks, heads, groups, GROUP: tl.constexpr):
    i = tl.program_id(0)
    i_i, i_h, i_b, i_g = place_program(i, blocks, heads, groups, GROUP)
    tl.store(p_out + 4 * i, i_i)
    tl.store(p_out + 4 * i + 1, i_h)
    tl.store(p_out + 4 * i + 2, i_b)
    tl.store(p_out + 4 * i + 3, i_g)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_program_has_its_own_place(shape: tuple[int, int, int, int]) -> None:
    """The function as compiled or interpreted, and the same on integers, for two batches."""
    blocks, heads, groups, group = shape
    total = 2 * blocks * heads * groups
    out = torch.full((total, 4), -1, dtype=torch.int32, device=DEVICE)
    _write_places[(total,)](out, blocks, heads, groups, group)
    places = [place_program.fn(i, *shape) for i in range(total)]
    assert [tuple(x) for x in out.tolist()] == places
    every = set(product(range(blocks), range(heads), range(2), range(groups)))
    assert len(places) == len(set(places)) and set(places) == every
    # Side by side: GROUP groups of one head before the next block.
    first = places[: min(group, groups)]
    assert first == [(0, 0, 0, g) for g in range(len(first))]


def _use_blocks(block: int | None) -> None:
    """Blocks of that size and groups of two, so that small inputs have ragged groups and blocks."""
    core = configs.Config({"ROWS": 2, "GROUP": 2, "BI": block, "BK": block, "LAZY": 1}, 4, 1)
    gradient = configs.Config({"GROUP": 2, "BI": block, "BK": block}, 4, 1)
    chosen = {f"attention_32{x}": core for x in ("", "_masked", "_window")}
    chosen |= {f"attention_{x}_32": gradient for x in ("dq", "dkv", "dbias")}
    for name, config in chosen.items():
        configs.override(name, 4, capability(DEVICE), config if block else None)


@pytest.fixture
def own_blocks() -> Iterator[None]:
    """The shipped sizes again after the test."""
    yield
    _use_blocks(None)


def _inputs(n: int, g0: int, g1: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(n)
    shapes = [(g0, g1, 2, n, 16)] * 3 + [(g0, 1, 2, n, n)]  # two heads
    return [torch.randn(s, generator=g, dtype=torch.float64).to(DEVICE) for s in shapes]


@pytest.mark.parametrize("n", [1, 17, 63, 100, 191])
def test_attention_is_right_in_groups(n: int, own_blocks: None) -> None:
    """Five lines in sets of two, groups of two: forward and gradients, with and without a mask."""
    g0 = 1 if n > 50 else 2
    _use_blocks(64 if n > 50 else 32 if n == 1 else 16)
    keep = torch.rand(g0, 5, n, generator=torch.Generator().manual_seed(1)) > 0.3
    keep[:, 0] = True
    keep[-1, -1] = False  # keeps none: attends to all
    keep = keep.to(DEVICE)
    for kept in (None, keep) if n in (1, 63) else (keep,):

        def op(*t: Tensor, impl: str, kept: Tensor | None = kept) -> tuple[Tensor, Tensor]:
            if impl == "reference" and kept is not None:
                kept = kept | ~kept.any(-1, keepdim=True)
            return attend(*t, 0.25, kept, impl)

        check(f"N={n} masked={kept is not None}", op, _inputs(n, g0, 5), torch.float32)


@pytest.mark.skipif(not INTERPRETED, reason="a compiled kernel cannot be listened to")
def test_kernels_visit_every_block_once(own_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    _use_blocks(32)
    seen: list[tuple[int, ...]] = []

    def listen(*sizes: object) -> object:
        place = place_program(*sizes)
        seen.append(tuple(int(x.handle.data.item()) for x in place))
        return place

    monkeypatch.setattr(attention, "place_program", listen)
    monkeypatch.setattr(attention_backward, "place_program", listen)
    leaves = [x.float().requires_grad_() for x in _inputs(70, 1, 5)]
    out = attend(*leaves, 0.25, None, "triton")[0]
    assert Counter(seen) == Counter(
        (i, h, 0, g) for i, h, g in product(range(3), range(2), range(3))
    )
    seen.clear()
    torch.autograd.grad(out.sum(), leaves)
    lines = Counter((i, h, 0, g) for i, h, g in product(range(3), range(2), range(5)))
    tiles = Counter((k, h, 0, i) for k, h, i in product(range(3), range(2), range(3)))
    assert Counter(seen) == lines + lines + tiles  # dq, dkv, dbias


def test_memory_that_attention_moves() -> None:
    """By hand where it can be: the bias once a wave in the old order, at least each byte once."""
    h100 = roofline.chip_named("H100")
    assert h100 is not None
    blocks = configs.candidates("attention_32", 2, "sm_90")[0].blocks
    found, before = {}, {}
    for n in (1024, 2048, 4096):
        gb = l2.memory_gb("triangle_attention_core", n, h100.sms, h100.l2_mb)
        found[n], before[n] = (float(x) for x in gb.values())
        (least,) = roofline.kernels("triangle_attention_core", n, 2)
        assert 0.999 * least.bytes / 1e9 <= found[n] <= before[n]
    # 262,144 programs by 132 at a time, a bias of four heads each time; q, k, v and out once.
    waves = 4096 // 128 * 4 * 2048 / 132
    by_hand = (waves * 4 * 4096**2 * 2 + 4 * 4096**2 * 128 * 2) / 1e9
    assert before[4096] == pytest.approx(by_hand, rel=0.05)
    assert found[4096] < before[4096] / 5 and found[2048] < before[2048] / 2.5
    exps_ms = roofline.floor("triangle_attention_core", 4096, 2, h100).ms
    assert found[4096] / h100.tbs < exps_ms / 3 < exps_ms < before[4096] / h100.tbs
    # No other size of a group is much better, and the gradients gain by theirs.
    for group in (4, 8, 16, 32):
        grid = l2.forward(4096, 4096, 4, 32, blocks | {"GROUP": group}, 2)
        assert l2.traffic(grid, h100.sms, h100.l2_mb * 1e6) / 1e9 > 0.9 * found[4096], group
    for name in ("dq", "dkv", "dbias"):
        own = configs.candidates(f"attention_{name}_32", 2, "sm_90")[0].blocks
        moved = [
            l2.traffic(l2.backward(name, 2048, 4, 32, own | {"GROUP": g}, 2), 396, 50e6)
            for g in (own["GROUP"], 1)
        ]
        assert moved[0] < moved[1] / 2, name
    # What fits L2 is read once: one wave of eight programs, four panels of each kind.
    grid = l2.Grid(4, 1, 2, 2, 1000, 3000, 10)
    assert l2.traffic(grid, 8, 1e6) == 4 * 1000 + 2 * 3000 + 8 * 10
    assert l2.traffic(grid, 1, 1e-3) == 8 * (1000 + 3000 + 10)


def test_programs_of_a_multiprocessor_by_hand() -> None:
    assert occupancy.programs("sm_90", 250, 64.5, 8) == 1  # 256 x 256 registers are all there are
    assert occupancy.programs("sm_90", 140, 72, 4) == 3  # by registers and by shared memory
    assert occupancy.programs("sm_90", 234, 52, 4) == 2  # by registers
    assert occupancy.programs("sm_89", 140, 56, 4) == 1  # by shared memory
    assert occupancy.programs("sm_80", 32, 0.1, 2) == 32  # by threads and by number


def test_the_table_uses_what_the_model_chooses() -> None:
    """From the compiled kernels; the other candidates pass the gate as well."""
    with aot.RESULT.open() as file:
        rows = list(csv.DictReader(file))
    warps = {}
    for kernel in occupancy.KERNELS:
        for chip in occupancy.CHIPS:
            found = occupancy.choices(kernel, chip, rows)
            chosen = occupancy.best(found)
            assert chosen is found[0], f"{kernel} on {chip}: list {chosen.config} first"
            warps[kernel, chip] = [c.config.warps for c in found]
    # Four warps exist for each of the four kernels that held a whole Hopper multiprocessor.
    for kernel in occupancy.KERNELS:
        assert set(warps[kernel, "sm_90"]) == {4, 8}
    # Epilogues that memory bounds gain; the transition and the core would read L2 twice as often.
    assert [warps[k, "sm_90"][0] for k in occupancy.KERNELS] == [8, 4, 4, 8]
    bad = [r | {"problems": "spills"} for r in rows]
    with pytest.raises(ValueError, match="`transition` on sm_90, BP=128.*spills"):
        occupancy.choices("transition", "sm_90", bad)
    with pytest.raises(ValueError, match="not compiled: run python -m bench.aot"):
        occupancy.choices("transition", "sm_90", [])
