"""An implementation is chosen once per op, where the caller says so or in a block of `using`."""

from __future__ import annotations

import ast
import inspect
import pkgutil
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import foldcp_kernels
from foldcp_kernels import default_impl, set_impl, transition, using
from foldcp_kernels.core import dispatch, op
from foldcp_kernels.core.arguments import Signature
from foldcp_kernels.pair_weighted_averaging import (
    PairWeightedAveragingWeights,
    pair_weighted_averaging,
)
from foldcp_kernels.transition import TransitionWeights
from foldcp_kernels.triangle_attention import TriangleAttentionWeights, choice, triangle_attention
from foldcp_kernels.triangle_multiplication import (
    TriangleMultiplicationWeights,
    triangle_multiplication,
)

ROOT = Path(__file__).parents[2]
N, C, H = 5, 16, 2


def _rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _squares(count: int) -> list[Tensor]:
    return [_rand(C, C) for _ in range(count)]


NORM = (_rand(C), _rand(C))
TRANSITION = TransitionWeights(*NORM, *_squares(3))
ATTENTION = TriangleAttentionWeights(*NORM, _rand(H, C), *_squares(5), H)
MULTIPLICATION = TriangleMultiplicationWeights(
    *NORM, _rand(2 * C, C), _rand(2 * C, C), *NORM, *_squares(2)
)
AVERAGING = PairWeightedAveragingWeights(*NORM, *NORM, *_squares(2), _rand(H, C), _rand(C, C), H)
PAIR = _rand(1, N, N, C)
# op -> (a call, the kernels that are chosen for it)
CALLS: dict[str, tuple[Callable[[str | None], Tensor], tuple[str, ...]]] = {
    "transition": (lambda i: transition(PAIR.clone(), TRANSITION, impl=i), ("transition",)),
    "attention": (
        lambda i: triangle_attention(PAIR.clone(), None, ATTENTION, True, i),
        ("triangle_attention", "norm_linear_planes", "attention", "adaptive_norm"),
    ),
    "multiplication": (
        lambda i: triangle_multiplication(PAIR.clone(), None, MULTIPLICATION, True, i),
        ("triangle_multiplication", "triangle_multiplication output"),
    ),
    "averaging": (
        lambda i: pair_weighted_averaging(_rand(1, 3, N, C), PAIR, AVERAGING, i),
        ("norm_linear_planes", "norm_linear", "gated_output"),
    ),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", CALLS)
def test_each_kernel_is_chosen_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And arguments are checked once: by the op, not by its parts."""
    call, kernels = CALLS[name]
    seen: Counter[str] = Counter()
    checked: list[str] = []
    choose, check = dispatch.choose, Signature.check

    def noted(self: Signature, *given: Any) -> None:
        checked.append(self.op)
        check(self, *given)

    def counted(op: str, *given: Any, **more: Any) -> str:
        seen[op] += 1
        return choose(op, *given, **more)

    for module in (op, choice):
        monkeypatch.setattr(module, "choose", counted)
    monkeypatch.setattr(Signature, "check", noted)
    found = {impl: call(impl) for impl in (None, "triton")}
    assert seen == dict.fromkeys(kernels, 2)
    assert len(checked) == 2, checked
    torch.testing.assert_close(found["triton"], found[None], rtol=1e-4, atol=1e-4)
    assert torch.equal(call("torch"), found[None])


@torch.no_grad()
def test_using_names_an_implementation_for_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    call = CALLS["transition"][0]
    seen: list[str] = []
    run = op.Op.run

    def noted(self: op.Op, chosen: str, *tensors: Any, **settings: Any) -> Any:
        seen.append(chosen)
        return run(self, chosen, *tensors, **settings)

    monkeypatch.setattr(op.Op, "run", noted)
    with using("triton"):
        call(None)
        with using("torch"):
            call(None)
            call("triton")
            set_impl("auto")  # ends with the block
        call(None)
        with pytest.raises(ZeroDivisionError), using("torch"):
            raise ZeroDivisionError
        assert default_impl() == "triton"
        with pytest.raises(ValueError, match="`impl` must be one of"), using("reference"):
            pass
        assert default_impl() == "triton"
    call(None)
    assert default_impl() == "auto"
    assert seen == ["triton", "torch", "triton", "triton", "torch"]


def _takes_impl() -> set[str]:
    """Public functions of foldcp_kernels that take `impl`, by module and name."""
    found = set()
    for module in pkgutil.walk_packages(foldcp_kernels.__path__, "foldcp_kernels."):
        if not module.name.endswith("._C"):
            for name, f in vars(import_module(module.name)).items():
                if inspect.isfunction(f) and "impl" in inspect.signature(f).parameters:
                    found |= {f"{f.__module__}.{name}"} if name == f.__name__ else set()
    return found


def test_only_public_ops_take_impl() -> None:
    """What is exported, and the three functions of the choice itself; nothing that a ring calls."""
    takes = _takes_impl()
    public = {f"{getattr(foldcp_kernels, n).__module__}.{n}" for n in foldcp_kernels.__all__}
    choices = {"core.dispatch.choose", "core.dispatch.named"}
    choices |= {
        f"{x}.choose_parts"
        for x in (
            "triangle_attention.choice",
            "triangle_multiplication.parts",
            "pair_weighted_averaging.parts",
        )
    }
    assert takes - public == {f"foldcp_kernels.{x}" for x in choices}
    assert len(takes & public) > 10
    for path in (ROOT / "foldcp").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("foldcp_ker"):
                names = {f"{node.module}.{a.name}" for a in node.names}
                assert not names & (takes - public), f"{path} imports {names & takes - public}"
            if isinstance(node, ast.Call):
                named = [k.arg for k in node.keywords]
                assert "impl" not in named, f"{path}:{node.lineno} names an implementation"
