"""Untrained checkpoints with the layout of the published Boltz ones.

The hyperparameters are those of the public Boltz-2 (506,724,992 parameters in size "real") and
Boltz-1 models. `boltz predict` itself sets the depth of the trunk: 64 pairformer blocks (Boltz-1:
48) and 4 MSA blocks, so a checkpoint for the command line has these at every size.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from boltz.model.layers import initialize
from boltz.model.models.boltz1 import Boltz1
from boltz.model.models.boltz2 import Boltz2
from torch import nn

from bench.synthetic import Kind, Size
from foldcp.boltz.families.dry_run.arguments import hyperparameters

# See `wake`. Chosen so that pLDDT and PAE use much of their range while a relative change of 1e-7
# in all weights moves no coordinate by more than 1e-3 angstrom at 16 blocks, 1e-2 at 64.
MATRIX_GAIN, VECTOR_NOISE, CONFIDENCE_GAIN, DISTANCE_GAIN = 0.5, 0.05, 4.0, 0.05


def build_model(arguments: dict[str, Any], kind: Kind = "boltz2", seed: int = 0) -> nn.Module:
    """Build a stock Boltz model with untrained weights that depend on `seed` alone.

    Args:
        arguments: from `hyperparameters`, changed as you like (for example fewer blocks).
        kind: "boltz2", "boltz2_affinity" or "boltz1".
        seed: seed of the weights; the global random state is left as it was.
    Returns:
        A float32 `Boltz2` or `Boltz1` in eval mode.
    """
    model_class = Boltz1 if kind == "boltz1" else Boltz2
    with torch.random.fork_rng(devices=[]), _fast_initialisation():
        torch.manual_seed(seed)
        model = model_class(**copy.deepcopy(arguments))
        wake(model)
    return model.eval()


def wake(model: nn.Module) -> None:
    """Give an untrained model outputs that depend on every module, in place.

    A fresh Boltz zeroes its output projections and gates, sets norms to 1 and predicts the same
    confidence everywhere; in that state a wrong or missing module changes nothing one could see.
    Parameters that hold one single value get noise, and confidence logits are scaled up. The
    embedding of binned distances is made smooth, as training makes it: rounding moves a distance
    across a bin edge in most comparisons, and unrelated neighbours would turn that into a jump.

    Args:
        model: `Boltz2` or `Boltz1` as constructed; random numbers come from the global state.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("dist_bin_pairwise_embed.weight"):
                parameter.copy_(DISTANCE_GAIN * _smooth_curves(*parameter.shape))
            elif bool((parameter == parameter.view(-1)[0]).all()):
                matrix = parameter.dim() == 2
                std = MATRIX_GAIN / math.sqrt(parameter.shape[1]) if matrix else VECTOR_NOISE
                parameter.add_(torch.randn_like(parameter), alpha=std)
            if "confidence" in name and name.endswith("_logits.weight"):
                parameter.mul_(CONFIDENCE_GAIN)


def _smooth_curves(length: int, channels: int) -> torch.Tensor:
    """Sine waves of random phase and of up to one period: [length, channels]."""
    phase, periods = 2 * math.pi * torch.rand(channels), 0.5 + 0.5 * torch.rand(channels)
    position = torch.arange(length)[:, None] / length
    return torch.sin(2 * math.pi * periods * position + phase)


def write_checkpoint(
    path: str | Path,
    size: Size = "tiny",
    kind: Kind = "boltz2",
    seed: int = 0,
    blocks: int | None = None,
) -> Path:
    """Write an untrained checkpoint that `boltz predict` loads.

    Args:
        path: file to write; a file already there is replaced in one step.
        size: "real" (2 GB) or "tiny".
        kind: "boltz2", "boltz2_affinity" or "boltz1".
        seed: seed of the weights.
        blocks: of the trunk's pairformer; None is the number that `boltz predict` asks for.
    Returns:
        `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    arguments = hyperparameters(size, kind)
    if blocks is not None:
        arguments["pairformer_args"]["num_blocks"] = blocks
    model = build_model(arguments, kind, seed)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    torch.save(
        {
            "state_dict": model.state_dict(),
            "hyper_parameters": arguments,
            "pytorch-lightning_version": "2.5.0",
            "epoch": 0,
            "global_step": 0,
            "loops": {},
            "callbacks": {},
            "optimizer_states": [],
            "lr_schedulers": [],
        },
        partial,
    )
    partial.replace(path)
    return path


@contextmanager
def _fast_initialisation() -> Iterator[None]:
    """Draw Boltz's truncated normals with torch: SciPy takes minutes for 507 M values."""
    stock = initialize.trunc_normal_init_

    def truncated_normal(weights: torch.Tensor, scale: float = 1.0, fan: str = "fan_in") -> None:
        width = initialize._calculate_fan(weights.shape, fan)
        # 0.8796 is the standard deviation of a unit normal cut at +-2.
        std = math.sqrt(scale / max(1, width)) / 0.8796
        nn.init.trunc_normal_(weights, std=std, a=-2 * std, b=2 * std)

    initialize.trunc_normal_init_ = truncated_normal
    try:
        yield
    finally:
        initialize.trunc_normal_init_ = stock
