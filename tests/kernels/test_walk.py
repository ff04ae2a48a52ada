"""A triangle attention is followed from its module to its kernels in few files, and none twice."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from foldcp.boltz.families.dry_run.mesh import fake_mesh
from foldcp.modules.trunk import block_weights
from foldcp.modules.trunk.block_weights import PairWeights
from foldcp_kernels import using
from foldcp_kernels.triangle_attention import TriangleAttentionWeights

ROOT = Path(__file__).parents[2]
FILES, CHANNELS, HEADS, N = 12, 32, 4, 64
KERNELS = ("norm_linear", "adaptive_norm", "attention", "gated_output")
LAUNCH = "foldcp_kernels/core/triton_launch.py"
# The exchange asks a ring's generator for what it sends: the one place where a walk turns back.
LOOP = ("foldcp/rings/", "foldcp/fabric/exchange/pipeline.py")
# rows, columns, rank and strategy of a mesh -> the kernels in the order of their files
WALKS = {
    (1, 1, 0, "auto"): ["norm_linear", "attention", "gated_output"],
    (2, 2, 1, "panel-direct"): ["norm_linear", "attention", "gated_output"],
    (2, 2, 1, "panel-ring"): ["norm_linear", "attention", "gated_output"],
    (2, 2, 1, "rows"): list(KERNELS),
}


def _stack() -> list[str]:
    """Files of the product from the module down to here; neighbours of one file once."""
    found: list[str] = []
    frame = sys._getframe(2)
    while frame:
        path = Path(frame.f_code.co_filename)
        name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else ""
        if name.startswith("foldcp") and found[:1] != [name]:
            found.insert(0, name)
        frame = frame.f_back
    return found


def _weights() -> PairWeights:
    """Weights of the attentions of a block; its other ops have none here."""
    norm, wide = torch.empty(2, CHANNELS), torch.empty(5, CHANNELS, CHANNELS)
    weights = TriangleAttentionWeights(*norm, torch.empty(HEADS, CHANNELS), *wide, HEADS)
    unused: Any = None
    return PairWeights(unused, unused, weights, weights, unused)


@torch.no_grad()
@pytest.mark.parametrize("at", WALKS, ids=lambda at: "-".join(map(str, at)))
def test_the_walk_of_z(at: tuple[int, int, int, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The list in docs/design/kernels.md, of both triangle attentions of a block."""
    walks: list[list[str]] = []

    def launch(kernel: Any, *_: Any, **__: Any) -> None:
        walks.append([*_stack(), LAUNCH])

    for name in KERNELS:
        monkeypatch.setattr(import_module(f"foldcp_kernels.{name}.fused"), "launch", launch)
    for other in ("triangle_multiplication", "transition"):
        monkeypatch.setattr(block_weights, other, lambda z, *_: z)
    rows, cols, rank, strategy = at
    mesh = fake_mesh(rows, cols, rank, "meta", attention=strategy)
    layout = mesh.layout(N)
    with torch.device("meta"):
        z = torch.empty(1, layout.tile_rows, layout.tile_cols, CHANNELS)
        mask, weights = torch.empty(1, *z.shape[1:3]), _weights()
    with using("triton"):
        block_weights.update_pair(z, weights, layout, mesh, mask)
    entered = {name for walk in walks for name in walk}
    assert all(walk[0] == "foldcp/modules/trunk/block_weights.py" for walk in walks)
    assert len(entered) <= FILES, sorted(entered)
    for walk in walks:
        once = [name for name in walk if not name.startswith(LOOP)]
        assert len(once) == len(set(once)), f"a file is entered again: {walk}"
    kernels = [next(k for k in KERNELS if f"/{k}/fused.py" in walk[-2]) for walk in walks]
    order = [k for i, k in enumerate(kernels) if kernels[:i][-1:] != [k]]
    assert order == WALKS[at] * 2
    note = (ROOT / "docs/design/kernels.md").read_text()
    assert not [name for name in entered if f"`{name}`" not in note]
