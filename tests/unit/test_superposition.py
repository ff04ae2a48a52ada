"""Rigid alignment without a decomposition, against the decomposition that Boltz uses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foldcp.modules.diffusion.superposition import Superposition, rotation_matrix

M = 64  # clouds


def clouds(kind: str) -> tuple[Tensor, Tensor]:
    """(moving, target), each [M, A, 3] in angstrom, float64."""
    g = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x, noise, turn = 20 * normal(M, 40, 3), normal(M, 40, 3), rotation_matrix(normal(M, 4))
    mirror = torch.tensor([1.0, 1.0, -1.0]).double()
    if kind == "random":
        return x, 20 * noise
    if kind == "planar":
        flat = x * torch.tensor([1.0, 1.0, 0.0])
        return flat, flat @ turn
    if kind == "mirrored":
        return x, (x * mirror) @ turn + 0.1 * noise
    if kind == "three atoms":
        return x[:, :3], 20 * noise[:, :3]
    if kind == "nearly a line":
        thin = x * torch.tensor([1.0, 1e-4, 1e-4])
        return thin, thin @ turn
    assert kind == "nearly any turn"  # the mirror image of an octahedron, hardly deformed
    corners = 10 * torch.cat([torch.eye(3), -torch.eye(3)]).double()
    return corners + 1e-3 * noise[:, :6], -corners @ turn


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [
        ("random", 1e-10),
        ("planar", 1e-10),
        ("mirrored", 1e-10),
        ("three atoms", 1e-10),
        # Both answers are right within rounding over the gap between the best turns.
        ("nearly a line", 1e-7),
        ("nearly any turn", 1e-8),
    ],
)
def test_alignment_is_that_of_the_decomposition(kind: str, tolerance: float) -> None:
    moving, target = clouds(kind)
    weight = torch.rand(M, moving.shape[1], generator=torch.Generator().manual_seed(2)).double()
    ours, theirs = (Superposition(weight, n)(moving, target) for n in (3, 2))
    assert float((ours - theirs).abs().max()) <= tolerance
    low = Superposition(weight.float(), 3)(moving.float(), target.float())
    assert low.dtype == torch.float32
    assert float((low - theirs).abs().max()) <= 1e9 * tolerance / 20


@pytest.mark.parametrize("gap", [0.0, 1e-13, 1e-9])
def test_alignment_without_one_best_turn_takes_one_of_them(gap: float) -> None:
    moving, target = clouds("nearly any turn")
    moving = gap * moving + (1 - gap) * torch.cat([torch.eye(3), -torch.eye(3)]).double() * 10
    weight = torch.ones(1, 6).double()
    ours, theirs = (Superposition(weight, n)(moving, target) for n in (3, 2))
    losses = [((x - target) ** 2).sum((1, 2)) for x in (ours, theirs)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-9)
    # A rotation: all distances are kept, and the image is not mirrored.
    torch.testing.assert_close(torch.cdist(ours, ours), torch.cdist(moving, moving))
    frames = [x[:, :3] - x[:, :3].mean(1, keepdim=True) + x[:, :1] for x in (ours, moving)]
    assert (torch.linalg.det(frames[0] - ours.mean(1, keepdim=True)).sign() == 1).all()
    assert Superposition(weight, 6)(torch.zeros(1, 6, 3), torch.zeros(1, 6, 3)).isfinite().all()
