"""Formats of the single track and the sampler: each group's products run in its format, alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import parity
import pytest
import torch
from ranks import run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from foldcp.boltz.families.swap import apply
from foldcp.fabric.mesh import Mesh
from foldcp.modules.diffusion import score_model
from foldcp_kernels.core.dispatch import products_in

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
SETTINGS = dict(steps=20, samples=1, recycling=0)
ALL = {"single", "tokens", "atoms"}
# Coordinates against float32, relative to their spread, untrained weights. Seen: 4e-4 and 5e-3.
BOUND = {"tf32": 8e-4, "bf16": 1e-2}


def rounded(x: Tensor) -> Tensor:
    """Round float32 to the 10 bits of mantissa that TF32 has, to nearest."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class Products(TorchDispatchMode):
    """Counts products by format, and rounds operands where TF32 is switched on, as a GPU does."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op in PRODUCTS:
            form = "bf16" if args[-1].dtype == torch.bfloat16 else "fp32"
            if form == "fp32" and torch.backends.cuda.matmul.allow_tf32:
                form = "tf32"
                args = tuple(rounded(x) if x.dtype == torch.float32 else x for x in args)
            self.of[form] += 1
        return op(*args, **(kwargs or {}))


def predicted(mesh: Mesh, folder: str, **formats: str) -> tuple[dict, Counter[str], Tensor]:
    """A prediction, its products by format, and where the generator ends."""
    prepared = parity.prepare(folder, parity.EXAMPLES / "heterodimer.yaml")
    model = parity.build_model()
    apply(model, mesh.with_policy(**formats))
    with Products() as products:
        out = parity.stock_outputs(model, parity.compact_features(prepared), **SETTINGS)
    return out, products.of, torch.get_rng_state()


def cases(mesh: Mesh, folder: str, wanted: list[dict[str, str]]) -> list[Any]:
    return [predicted(mesh, folder, **formats) for formats in wanted]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("formats")
    parity.prepare(path, parity.EXAMPLES / "heterodimer.yaml")
    return str(Path(path))


def off(out: dict[str, Any], want: dict[str, Any]) -> float:
    x, y = out["coords"], want["coords"]
    spread = (y - y.mean(-2, keepdim=True)).norm(dim=-1).mean()
    return float((x - y).norm(dim=-1).mean() / spread)


@pytest.mark.parametrize("form", ["tf32", "bf16"])
def test_each_group_alone_and_all_together(folder: str, form: str) -> None:
    wanted = [{}, *({group: form} for group in sorted(ALL)), dict.fromkeys(ALL, form)]
    (plain, none, drawn), *found = run(1, 1, cases, folder, wanted)[0]
    assert set(none) == {"fp32"}
    for out, products, state in found:
        assert 0 < off(out, plain) < BOUND[form]
        assert products["fp32"] and set(products) == {"fp32", form}
        assert out["coords"].dtype == out["plddt"].dtype == torch.float32
        assert torch.equal(state, drawn), "the same seed draws the same noise"
    alone, together = found[:-1], found[-1]
    assert sum(products[form] for _, products, _ in alone) == together[1][form]


def test_a_mesh_gives_what_one_rank_gives(folder: str) -> None:
    wanted = [{}, dict.fromkeys(ALL, "tf32")]
    (plain, _, _), (one, _, _) = run(1, 1, cases, folder, wanted)[0]
    (many, products, _) = run(2, 2, cases, folder, wanted[1:])[0][0]
    assert products["tf32"] > 100
    # Another order of sums is a rounding of its own in every step.
    assert off(many, one) < BOUND["tf32"] and off(many, plain) < BOUND["tf32"]


def test_the_switch_is_the_process_s_own_again(folder: str, monkeypatch: Any) -> None:
    seen = []

    def fails(*_: Any) -> None:
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        raise RuntimeError("rigged")

    monkeypatch.setattr(score_model, "token_transformer", fails)
    with pytest.raises(RuntimeError, match="rigged"):
        predicted(Mesh.create(1, 1), folder, tokens="tf32")
    assert seen == [True] and not torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        for form in ("fp32", "tf32", "bf16"):
            with products_in(form, "cpu"):
                assert torch.backends.cuda.matmul.allow_tf32
            assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
