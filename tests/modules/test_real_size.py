"""Boltz-2 at its real size (64 trunk blocks, 507 M parameters) on a mesh, against stock."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import parity
import torch
from ranks import run
from strict import strict
from torch import nn

from bench.synthetic import checkpoint
from foldcp.boltz.families.swap import apply
from foldcp.cli.compare import TOLERANCES
from foldcp.fabric.mesh import Mesh

INPUT = parity.EXAMPLES / "heterodimer.yaml"  # 67 tokens, 64 and 40 sequences
SETTINGS = {"steps": 20, "samples": 1, "recycling": 0}  # recycles: tests/modules/test_model.py
BLOCKS = {"pairformer_blocks": 64, "msa_blocks": 4, "confidence_blocks": 8}
PARAMETERS = 506_724_992


def shared_model(weights: str) -> nn.Module:
    """The model with its weights mapped from one file, so that four ranks hold one copy."""
    # On the meta device there is nothing to initialise.
    with torch.device("meta"), patch.object(checkpoint, "wake", lambda _: None):
        model = parity.build_model("real", **BLOCKS)
    state = torch.load(weights, mmap=True, weights_only=True)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False)


def predict(mesh: Mesh, folder: str, weights: str) -> dict[str, Any]:
    model = shared_model(weights)
    apply(model, mesh)
    feats = parity.compact_features(parity.prepare(folder, INPUT))
    return parity.stock_outputs(model, feats, **SETTINGS)


def test_real_size_on_2x2(tmp_path: Path) -> None:
    prepared = parity.prepare(tmp_path, INPUT)
    model = parity.build_model("real", **BLOCKS)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS
    weights = str(tmp_path / "weights.pt")
    torch.save(model.state_dict(), weights)
    torch.set_num_threads(2)
    torch.utils.deterministic.fill_uninitialized_memory = False  # stock is not under test
    try:
        want = parity.stock_outputs(model, parity.stock_features(prepared), **SETTINGS)
    finally:
        strict()
    del model
    got = run(2, 2, predict, str(tmp_path), weights, fresh=True)[0]
    compared = TOLERANCES.keys() & want.keys()
    assert {"coords", "plddt", "pae", "pde", "ptm", "iptm"} <= compared
    for key in compared:
        allowed = TOLERANCES[key]
        away = (got[key] - want[key]).abs()
        assert away.max() <= allowed.largest, f"{key}: {away.max():.2e}"
        assert away.mean() <= allowed.mean, f"{key}: mean {away.mean():.2e}"
