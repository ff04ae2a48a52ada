"""Draw the random numbers that folding one input draws, without folding it.

A data-parallel group steps over the inputs of the others with it, so that each input sees the
numbers that it sees when one process folds all of them in turn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foldcp.modules.base import draw_dropout, draw_pair_dropout
from foldcp.modules.diffusion.noise import noise_schedule
from foldcp.modules.diffusion.superposition import random_augmentation
from foldcp.modules.model import FoldOnMesh
from foldcp.modules.settings import Features, Parts, Settings


def replay(fold: FoldOnMesh, feats: Features, settings: Settings) -> None:
    """Draw what a prediction draws, in its order and shapes.

    Args:
        fold: predicts with a swapped model.
        feats: compact features of the input.
        settings: of the prediction.
    """
    model, device = fold.model, fold.mesh.device
    n = feats["token_index"].shape[1]
    for _ in range(settings.recycling_steps + 1):
        draw_trunk(model, fold.parts, feats, n, device)
    steering = None if fold.steering is None else fold.steering(feats, device)
    draw_sampler(model.structure_module, feats, settings, steering, device)
    if fold.parts.confidence:
        for _ in range(settings.diffusion_samples):
            draw_confidence(model.confidence_module, fold.parts, feats, n, device)


def draw_confidence(
    module: Any, parts: Parts, feats: Features, n: int, device: torch.device
) -> None:
    """Draw the random numbers that rating one sample would draw.

    Args:
        module: the confidence module.
        parts: of the model.
        feats: compact features.
        n: N.
        device: of the generator.
    """
    if parts.rating_trunk:
        draw_msa(module.msa_module, feats, n, device)
        draw_stack(module.pairformer_module, 1, n, device)
    else:
        draw_stack(module.pairformer_stack, 1, n, device)


def draw_trunk(model: Any, parts: Parts, feats: Features, n: int, device: torch.device) -> None:
    """Draw the random numbers of one pass of the trunk: templates, MSA, pairformer.

    Args:
        model: swapped.
        parts: of the model.
        feats: compact features.
        n: N.
        device: of the generator.
    """
    if parts.templates:
        templates = feats["template_mask"].shape[1]
        draw_stack(model.template_module.pairformer, templates, n, device)
    draw_msa(model.msa_module, feats, n, device)
    draw_stack(model.pairformer_module, 1, n, device)


def draw_stack(stack: Any, batch: int, n: int, device: torch.device) -> None:
    """Draw the random numbers of a stack of pairformer layers on N tokens.

    Args:
        stack: of pairformer layers.
        batch: B.
        n: N.
        device: of the generator.
    """
    for _ in stack.layers:
        draw_pair_dropout(batch, n, device)


def draw_msa(module: Any, feats: Features, n: int, device: torch.device) -> None:
    """Draw the random numbers of the MSA module: the choice of rows, and its dropouts.

    Args:
        module: the MSA module.
        feats: compact features.
        n: N.
        device: of the generator.
    """
    rows = feats["msa"].shape[1]
    if module.options.most_rows is not None:
        rows = len(torch.randperm(rows)[: module.options.most_rows])
    for _ in module.layers:
        draw_dropout((1, rows, 1, 1), device)
        draw_pair_dropout(1, n, device)


def draw_sampler(
    sampler: Any, feats: Features, settings: Settings, steering: Any, device: torch.device
) -> None:
    """Draw the random numbers of the sampler: noise, augmentations, and the choice of particles.

    Args:
        sampler: of the model.
        feats: compact features.
        settings: of the prediction.
        steering: the potentials, None for none.
        device: of the generator.
    """
    particles = 1 if steering is None else steering.num_particles
    count = settings.diffusion_samples * particles
    shape = (count, feats["atom_pad_mask"].shape[1], 3)
    steps = settings.sampling_steps or sampler.options.num_sampling_steps
    like = torch.randn(shape, device=device)
    for i, level in enumerate(noise_schedule(sampler.options, steps, device)[1]):
        random_augmentation(count, like)
        torch.randn(shape, device=device)
        if steering is None or not steering.resample:
            continue
        last = i == steps - 1
        if last or (i % steering.resampling_interval == 0 and level.noise_var > 0):
            _draw_particles(like, settings.diffusion_samples, particles, last)


def _draw_particles(like: Tensor, samples: int, particles: int, last: bool) -> None:
    weights = like.new_ones((samples, particles))
    torch.multinomial(weights, 1 if last else particles, replacement=True)
