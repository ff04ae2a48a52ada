"""Tiled modules take what they need of a model as options: Boltz's own attributes are not read."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import boltz1
import parity
import pytest
import torch
from torch import nn

from foldcp.boltz.families.swap import apply
from foldcp.fabric.mesh import Mesh
from foldcp.modules.base import TiledModule

PLAIN = (bool, int, float, str, tuple, list, dict)


def strip(module: nn.Module) -> set[str]:
    """Delete the plain attributes of a module of Boltz; returns their names.

    Parameters, buffers and submodules stay, and so do the attributes of torch's own modules.
    """
    if not type(module).__module__.startswith("boltz"):
        return set()
    plain = {
        name
        for name, value in vars(module).items()
        if isinstance(value, PLAIN) and not name.startswith("_") and name != "training"
    }
    for name in plain:
        delattr(module, name)
    return plain


def swapped_and_stripped(model: nn.Module) -> set[str]:
    """Swap a model, and delete Boltz's attributes as soon as a tiled module takes one over."""
    gone: set[str] = set()
    take_over = TiledModule.__init__

    def init(self: TiledModule, twin: nn.Module, mesh: Mesh) -> None:
        take_over(self, twin, mesh)
        gone.update(strip(twin))

    with mock.patch.object(TiledModule, "__init__", init):
        apply(model, Mesh.create(1, 1))
    for module in model.modules():
        gone.update(set() if module is model else strip(module))
    return gone


def check(stock: nn.Module, again: nn.Module, feats: dict[str, Any], expected: set[str]) -> None:
    apply(stock, Mesh.create(1, 1))
    gone = swapped_and_stripped(again)
    assert expected <= gone, "the test deletes nothing of this kind"
    want, got = (
        parity.stock_outputs(x, feats, steps=20, samples=1, recycling=0) for x in (stock, again)
    )
    for key in ("coords", "plddt", "pae"):
        assert torch.equal(got[key], want[key]), key


@pytest.mark.parametrize("name", ["template", "constraints"])
def test_boltz2(tmp_path: Path, name: str) -> None:
    feats = parity.compact_features(parity.prepare(tmp_path, parity.EXAMPLES / f"{name}.yaml"))
    expected = {"num_heads", "no_heads", "cutoff_min", "min_dist", "subsample_msa", "head_dim"}
    check(parity.build_model(), parity.build_model(), feats, expected)


@pytest.mark.parametrize("imitate_trunk", [True, False])
def test_boltz1(tmp_path: Path, imitate_trunk: bool) -> None:
    feats = boltz1.features(boltz1.process(tmp_path), "ligand", True)
    models = (boltz1.build_model(imitate_trunk, torch.float32) for _ in range(2))
    check(*models, feats, {"num_heads", "no_heads", "no_update_s", "subsample_msa"})
