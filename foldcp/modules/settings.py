"""Inputs of a prediction: Boltz's options, features, and a keeper of its trunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Features = dict[str, Any]
Like = dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]  # shape, dtypes that may be


@dataclass(frozen=True)
class Settings:
    """Settings of one prediction (Boltz's own options)."""

    recycling_steps: int
    sampling_steps: int
    diffusion_samples: int
    max_parallel_samples: int | None = None
    keep_z: bool = False


class KeptTrunk(Protocol):
    """Keeps the result of one input's trunk, so that a run that died need not compute it again."""

    def load(self, like: Like) -> tuple[Tensor, Tensor] | None:
        """Load `s` and `z` if they were kept; may replace `ref_pos` in the features."""

    def save(self, s: Tensor, z: Tensor) -> None:
        """Keep them.

        Args:
            s: single shard [1, n, C_s].
            z: pair tile [1, T_r, T_c, C].
        """


class Keeper(Protocol):
    """Makes, per input, what keeps its trunk."""

    def begin(self, feats: Features, settings: Settings) -> KeptTrunk:
        """Begin an input; returns the keeper of its trunk.

        Args:
            feats: compact features.
            settings: of the prediction.
        """
