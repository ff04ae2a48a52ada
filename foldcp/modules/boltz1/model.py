"""Boltz-1 on a mesh: the stages of Boltz-2 with Boltz-1's embeddings, conditioning and scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from foldcp.fabric.mesh import Mesh
from foldcp.modules.confidence.ratings import Ratings
from foldcp.modules.model import FoldOnMesh
from foldcp.modules.settings import Features, Parts


class FoldBoltz1OnMesh(FoldOnMesh):
    """Runs a swapped Boltz-1.

    Args:
        model: Boltz-1 whose submodules are tiled modules (see foldcp.boltz.families.boltz1).
        mesh: the mesh.
        parts: optional parts that the model has.
        steering: makes the steering of one sample from its features, None when none applies.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        parts: Parts,
        steering: Callable[[Features, torch.device], Any] | None = None,
    ) -> None:
        super().__init__(model, mesh, parts, steering)
        self._conditioner = self.model.structure_module.score_model.conditioner()

    @property
    def conditioner(self) -> nn.Module:
        """Conditions the sampler on the trunk."""
        return self._conditioner

    def rate(self, *trunk: Any, **options: Any) -> Ratings:
        """Rate the samples, see `ConfidenceModule.forward`.

        Args:
            trunk: the positional arguments of `ConfidenceModule.forward`.
            options: its other arguments.
        """
        sampler = self.model.structure_module
        tokens, sampler.gathered = sampler.gathered, None
        return super().rate(*trunk, s_diffusion=tokens, **options)
