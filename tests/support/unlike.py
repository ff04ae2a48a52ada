"""Ranks on GPUs of several kinds, on which a seed gives different numbers."""

from __future__ import annotations

from unittest import mock

import parity
import torch
from torch import Tensor

from foldcp.boltz.families.dry_run.features import features
from foldcp.boltz.families.swap import apply
from foldcp.fabric.mesh import Mesh
from foldcp.modules.settings import Settings
from foldcp.modules.trunk.msa import MSAOptions
from foldcp.planner import agreement

TOKENS = 12


def predicted(mesh: Mesh) -> tuple[list[tuple[Tensor, Tensor]], list[str]]:
    """Coordinates and pLDDT of ranks that draw alike and of such that do not; what was said."""
    torch.manual_seed(0)
    feats = features(TOKENS, 6)
    feats["msa"] = torch.randint(2, 22, feats["msa"].shape, dtype=torch.uint8)  # rows matter
    found: list[tuple[Tensor, Tensor]] = []
    said: list[str] = []

    def warning(text: str, *given: str) -> None:
        said.append(text % given)

    for kind, seed in (("GPU", 7), *((f"GPU {mesh.rank}", 7 + mesh.rank),) * 2):
        model = parity.build_model(steering={"contact_guidance_update": False})
        apply(model, mesh)
        model.msa_module.options = MSAOptions(paired=True, most_rows=3)
        torch.manual_seed(seed)
        with (
            mock.patch.object(agreement, "kind", lambda _, kind=kind: kind),
            mock.patch.object(agreement.LOG, "warning", warning),
        ):
            out = model.predict_step.fold(dict(feats), Settings(1, 3, 2))
        found.append((out.coords, out.ratings.plddt))
    return found, said


def check(rank: int, found: list[tuple[Tensor, Tensor]], said: list[str]) -> None:
    """All ranks have the numbers that they have when they draw alike, and rank 0 says so once."""
    for coords, plddt in found[1:]:
        assert torch.equal(coords, found[0][0]), f"rank {rank}"
        assert torch.equal(plddt, found[0][1]), f"rank {rank}"
    assert len(said) == (rank == 0), said
    assert rank or "rank 1 is on GPU 1, rank 0 on GPU 0" in said[0]
