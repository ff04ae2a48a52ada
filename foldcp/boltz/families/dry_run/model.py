"""Build Boltz models in their real dimensions from shapes alone, as shallow as peaks allow."""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache
from typing import Any
from unittest import mock

import boltz.main
import torch
from boltz.model.layers import initialize
from boltz.model.models.boltz1 import Boltz1
from boltz.model.models.boltz2 import Boltz2
from torch import nn

from foldcp.boltz.families.dry_run.arguments import hyperparameters
from foldcp.boltz.families.dry_run.device import FakeDevice

BLOCKS, MSA_BLOCKS, CONFIDENCE_BLOCKS = 2, 1, 1


def shallow_model() -> dict[str, Any]:
    """Return the arguments of Boltz-2 in its real dimensions, with as few blocks as peaks need."""
    arguments = hyperparameters("real")
    arguments["confidence_model_args"]["pairformer_args"]["num_blocks"] = CONFIDENCE_BLOCKS
    return arguments | dict(
        pairformer_args=asdict(boltz.main.PairformerArgsV2(num_blocks=BLOCKS)),
        msa_args=asdict(boltz.main.MSAModuleArgs(msa_blocks=MSA_BLOCKS, subsample_msa=True)),
        diffusion_process_args=asdict(boltz.main.Boltz2DiffusionParams()),
        steering_args=None,
        ema=False,
        use_kernels=False,
    )


def shallow_boltz1() -> dict[str, Any]:
    """Return the same for Boltz-1, whose confidence module repeats the trunk."""
    msa = boltz.main.MSAModuleArgs(
        msa_blocks=MSA_BLOCKS, subsample_msa=True, use_paired_feature=False
    )
    return hyperparameters("real", "boltz1") | dict(
        pairformer_args=asdict(boltz.main.PairformerArgs(num_blocks=BLOCKS)),
        msa_args=asdict(msa),
        diffusion_process_args=asdict(boltz.main.BoltzDiffusionParams()),
        steering_args=None,
        ema=False,
        use_kernels=False,
    )


@lru_cache
def shapes_of_model(kind: str = "boltz2") -> nn.Module:
    """Build Boltz-2, or "boltz1", without memory for its parameters."""
    # Stock draws truncated normals with SciPy, which shapes do not need.
    with mock.patch.object(initialize, "trunc_normal_init_"), torch.device("meta"):
        model = Boltz1(**shallow_boltz1()) if kind == "boltz1" else Boltz2(**shallow_model())
        return model.eval().requires_grad_(False)


def onto(model: nn.Module, device: FakeDevice) -> None:
    """Give every parameter and buffer a fake tensor on the device, in place.

    Args:
        model: from `shapes_of_model`.
        device: that counts them.
    """
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                fake = torch.empty(p.shape, dtype=p.dtype, device="cuda")
                module._parameters[name] = nn.Parameter(fake, requires_grad=False)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device="cuda")
