"""What holds for every kernel: offsets beyond 2^31, configurations, and what chips compile them to.

The compiled kernels are inspected without a GPU (bench.aot); here what Boltz runs, the whole table
by `python -m bench.aot`.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from kernel_checks import DEVICE, error
from torch import Tensor

from bench import aot, sass, tune
from bench.timing import Times
from foldcp_kernels.adaptive_norm.fused import adaptive_norm_fwd
from foldcp_kernels.attention import attend
from foldcp_kernels.binned_heads.fused import expected_values_fwd
from foldcp_kernels.core import triton_configs as configs
from foldcp_kernels.gated_output.fused import attention_output_fwd, multiplication_output_fwd
from foldcp_kernels.norm_linear.fused import norm_linear_fwd
from foldcp_kernels.outer_product_mean import fused as outer_product_mean
from foldcp_kernels.transition.fused import transition_fwd

ROOT = Path(__file__).parents[2]
# Elements between neighbours: the stride fits int32, the offset of the third entry does not.
FAR = (1 << 30) + 64


@pytest.fixture(scope="module")
def far() -> Tensor:
    """12 GiB of float16 of which only what is written takes memory (on a GPU: all of it).

    Tensors lie in the second half, so that an offset that wraps reads zeros and does not crash.
    """
    if DEVICE.type == "cuda":
        return torch.empty(6 * FAR, dtype=torch.float16, device=DEVICE)
    return torch.from_numpy(np.zeros(6 * FAR, dtype=np.float16))


def spread(far: Tensor, x: Tensor, dim: int, at: int = 0) -> Tensor:
    """A copy of `x` whose entries along `dim` lie FAR elements apart."""
    strides = list(x.contiguous().stride())
    strides[dim] = FAR
    view = far.as_strided(x.shape, strides, 3 * FAR + at)
    return view.copy_(x)


def test_offsets_beyond_int32(far: Tensor) -> None:
    """N = 8192 at C = 128 has 2^33 elements: each kernel, with lines or planes far apart."""
    g = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).half().to(DEVICE)

    c, n = 32, 5
    x, w, gate = rand(1, 3, n, c), rand(c, c), rand(c, c)
    gain, shift = rand(c), rand(c)
    lines = spread(far, x, 1)
    for planes in (True, False):
        args = dict(planes=planes, gate=gate if planes else None)
        want = norm_linear_fwd(x, gain, shift, w, **args)
        assert torch.equal(norm_linear_fwd(lines, gain, shift, w, **args), want)
        if planes:
            empty = far.as_strided((1, 3, 3, n), [0, FAR, 16, 1], 3 * FAR + 4096)
            want, w3, g3 = want[:, :3], w[:3].contiguous(), gate[:3].contiguous()
            norm_linear_fwd(x, gain, shift, w3, planes=True, gate=g3, out=empty)
        else:
            empty = far.as_strided(want.shape, [0, FAR, c, 1], 3 * FAR + 4096)
            norm_linear_fwd(x, gain, shift, w, planes=False, out=empty)
        assert torch.equal(empty, want)
    want = transition_fwd(x, gain, shift, w, gate, w)
    assert torch.equal(transition_fwd(lines, gain, shift, w, gate, w), want)
    assert torch.equal(transition_fwd(lines, gain, shift, w, gate, w, out=lines), want)
    lines = spread(far, x, 1)
    o = rand(1, 3, n, c)
    want = attention_output_fwd(x, gain, shift, gate, o, w)
    got = attention_output_fwd(lines, gain, shift, gate, spread(far, o, 1, 8192), w)
    assert torch.equal(got, want)
    y = rand(1, 3, 3, n)
    w3 = w[:, :3].contiguous()
    want = multiplication_output_fwd(x, gain, shift, gate, y, gain[:3], shift[:3], w3)
    got = multiplication_output_fwd(
        lines, gain, shift, gate, spread(far, y, 1, 8192), gain[:3], shift[:3], w3
    )
    assert torch.equal(got, want)
    values = torch.rand((2, c), generator=g).to(DEVICE)
    want = expected_values_fwd(x, w, values, other=o)
    assert torch.equal(expected_values_fwd(lines, w, values, other=spread(far, o, 1, 8192)), want)
    a = rand(3, n, c)
    want = adaptive_norm_fwd(a, x[:, 0], x[:, 1], torch.float16, True, 1e-5)
    apart = spread(far, a, 0)
    assert torch.equal(adaptive_norm_fwd(apart, x[:, 0], x[:, 1], torch.float16, True, 1e-5), want)


def test_outer_product_offsets_beyond_int32(far: Tensor) -> None:
    """16,384 sequences of 5,000 tokens: slices of channels far apart."""
    g, inner = torch.Generator().manual_seed(0), outer_product_mean._operands

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).half().to(DEVICE)

    def apart(*args: Any) -> tuple[Tensor, Tensor]:
        left, right = inner(*args)
        strides = left.stride(0), FAR // 2, *left.stride()[2:]
        assert (left.shape[1] - 1) * strides[1] > 1 << 31
        return far.as_strided(left.shape, strides, 2 * FAR).copy_(left), right

    inputs = rand(1, 3, 5, 32), rand(1, 2, 3, 32), rand(1, 2, 5, 32)
    inputs += torch.ones(1, 3, 5, device=DEVICE), rand(32, 1024), rand(32)
    want = outer_product_mean.outer_product_mean_fwd(*inputs, False)
    with mock.patch.object(outer_product_mean, "_operands", apart):
        assert torch.equal(outer_product_mean.outer_product_mean_fwd(*inputs, False), want)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_attention_offsets_beyond_int32(far: Tensor, dim: int) -> None:
    """Rows, heads or keys far apart, gradients too."""
    g = torch.Generator().manual_seed(dim)
    q, k, v = (torch.randn(1, 3, 3, 3, 16, generator=g).half().to(DEVICE) for _ in range(3))
    bias = torch.randn(1, 1, 3, 3, 3, generator=g).half().to(DEVICE)
    dout = torch.randn(1, 3, 3, 3, 16, generator=g).half().to(DEVICE)

    def run(*tensors: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = attend(*leaves, 0.2, impl="triton")[0]
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    want = run(q, k, v, bias)
    apart = [spread(far, x, dim, 65536 * i) for i, x in enumerate((q, k, v))]
    apart.append(spread(far, bias, max(dim, 2), 65536 * 4))
    for got, x in zip(run(*apart), want, strict=True):
        assert torch.equal(got, x)


def test_every_kernel_has_a_configuration_for_every_chip() -> None:
    for kernel, operand in configs.TABLE:
        for chip in (0, *aot.CHIPS, 86, 103, 121, 999):
            used = configs.pick(kernel, operand, chip)
            names = used.blocks.keys()
            for found in (used, *configs.candidates(kernel, operand, configs.family(chip))):
                assert found.blocks.keys() == names, kernel
                assert found.warps in (1, 2, 4, 8) and 1 <= found.stages <= 4
                measured = found.source == configs.UNTUNED or (ROOT / found.source).is_file()
                assert measured, f"{kernel}: {found.source} is no file of this repository"


def test_tuned_cache_takes_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    configs.TUNED.forget()
    shipped = configs.pick("transition", 2, 90)
    path = configs.cache_file()
    path.parent.mkdir(parents=True)
    blocks = {"BP": 32, "BH": 16}
    entry = {"blocks": blocks, "warps": 2, "stages": 1, "source": "a test"}
    path.write_text(json.dumps({"transition/2/sm_90": entry}))
    configs.TUNED.forget()
    assert configs.pick("transition", 2, 90) == configs.Config(blocks, 2, 1, "a test")
    assert configs.pick("transition", 2, 80) == configs.candidates("transition", 2, "any")[0]
    # A size that came after the cache was written is the shipped one.
    path.write_text(json.dumps({"transition/2/sm_90": entry | {"blocks": {"BP": 32}}}))
    configs.TUNED.forget()
    merged = configs.pick("transition", 2, 90).blocks
    assert merged == {"BP": 32, "BH": shipped.blocks["BH"]}
    path.unlink()
    configs.TUNED.forget()
    assert configs.pick("transition", 2, 90) == shipped


def test_tuning_takes_the_fastest_right_one_of_those_it_has_time_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One candidate is wrong, one fails to compile; listed ones come before all others."""
    ms = {None: 4.0, 64: 2.0, 1: 1.0, 2: 2.5, 3: 1.5, 4: 3.9}
    current: list[int | None] = [None]
    tried: list[tuple[str, int]] = []
    listed = (configs.Config({"B": 128}), configs.Config({"B": 64}))
    monkeypatch.setattr(tune.configs, "candidates", lambda kernel, size, chip: listed)
    some = tune.Search("any", {"B": (1, 2, 3, 4)}, warps=(4,), stages=(1,))
    monkeypatch.setattr(tune, "SEARCHES", {"a": some, "b": some})

    def make(name: str) -> tune.Kernel:
        def apply(config: configs.Config | None) -> None:
            current[0] = None if config is None else config.blocks["B"]
            if current[0] is not None:
                tried.append((name, current[0]))

        def call() -> Tensor:
            if current[0] == 2:
                raise RuntimeError("out of resources")
            return torch.ones(3) * (2 if current[0] == 1 else 1)

        return tune.Kernel(name, apply, call)

    def timed(clock, calls, seconds):
        return {name: Times(ms[current[0]], 0, 0, 1) for name in calls}

    monkeypatch.setattr(tune, "interleaved", timed)
    budget = iter([1.0] * 9 + [0.0] * 99)
    a, b = tune.search(["a", "b"], "sm_90", make, None, lambda: next(budget))
    # 64 of both first; then four of "a", in which the time ends.
    assert tried == [("a", 64), ("b", 64), ("a", 1), ("a", 2), ("a", 3), ("a", 4)]
    assert (a.best[0].blocks["B"], a.best[1], a.shipped) == (3, 1.5, 4.0) and current == [None]
    assert (b.best[0].blocks["B"], b.best[1]) == (64, 2.0)
    assert [r["status"] for r in a.rows] == ["ok", "wrong", "failed", "ok", "ok"]


def test_tuning_without_a_gpu_says_so_and_can_be_rehearsed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if DEVICE.type == "cpu":
        assert tune.main(["--dry-run"]) == 2
        assert "GPU" in capsys.readouterr().err
        chosen = ["--kernel", "attention_32", "--kernel", "multiplication_output"]
        assert tune.main([*chosen, "--rehearse", "--out", str(tmp_path)]) == 0
        with (tmp_path / "tune.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert {r["kernel"] for r in rows} == {"attention_32", "multiplication_output"}
        assert all(r["status"] == "ok" and float(r["ms"]) > 0 for r in rows), rows
        assert not configs.TUNED.found, "a rehearsal leaves the table alone"


def test_the_gate_sees_what_is_wrong() -> None:
    """Spills, too much shared memory, a missing tensor-core instruction, ignored warp splits."""
    good = {
        "kernel": "transition_kernel", "chip": "sm_90", "constants": "BP=128, num_warps=8",
        "registers": 255, "shared_kib": 128.0, "warps": 8, "stages": 2, "spills": 0,
        "tensor_core": "HGMMA", "operands": "bf16",
    }  # fmt: skip
    assert aot.problems(good, False, False) == []
    for change, word in (
        ({"spills": 8}, "spills"),
        ({"shared_kib": 228.0}, "KiB"),
        ({"tensor_core": "none"}, "no tensor-core"),
        ({"tensor_core": "HMMA"}, "HMMA instead of HGMMA"),
        ({"operands": "none"}, "dots of none"),
    ):
        (found,) = aot.problems(good | change, False, False)
        assert word in found
    assert aot.problems(good, False, True) == ["warp specialisation was asked for and ignored"]
    assert aot.problems(good | {"tensor_core": "HMMA", "operands": "f32"}, False, False) == []
    plain = {"kernel": "adaptive_norm_kernel", "tensor_core": "none", "operands": "none"}
    assert aot.problems(good | plain, False, False) == []


def test_issue_slots_are_those_of_the_loop() -> None:
    """Two MUFU and 14 others in the loop, 70 more in a branch that is seldom taken."""

    def line(i: int, text: str) -> str:
        return f"        /*{i:04x}*/                   {text} ;"

    rare = [line(64 + i, "FADD R1, R1, R2") for i in range(70)]
    body = [line(i, "FFMA R1, R1, R2, R3") for i in range(10)]
    body += [line(11, "MUFU.EX2 R4, R5"), line(12, "@!P0 MUFU.EX2 R4, R5")]
    body += [line(13, "ISETP.GE.AND P1, PT, R1, R2, PT"), line(14, "@P1 BRA `(.L_x_2)"), *rare]
    body += [".L_x_2:", line(300, "@P0 BRA `(.L_x_1)")]
    text = "\n".join([line(0, "MOV R1, R2"), ".L_x_1:", *body, line(301, "EXIT")])
    assert sass.hot_loop(text) == {"FFMA": 10, "MUFU": 2, "ISETP": 1, "BRA": 2}
    assert sass.issue_ratio(text) == 15 / 16
    assert sass.issue_ratio(line(0, "EXIT")) is None


def test_float32_products_are_not_tf32() -> None:
    """A float32 kernel must be as exact as float32: on a GPU this sees a single tf32 pass."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 1, 64, 32, generator=g).to(DEVICE) for _ in range(3))
    want = attend(*(x.double() for x in (q, k, v)), None, 1.0, impl="reference")[0]
    assert error(attend(q, k, v, None, 1.0, impl="triton")[0], want) < 2e-5
