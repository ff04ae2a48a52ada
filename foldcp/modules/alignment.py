"""Random rotations and rigid alignment of coordinates, with the draws and arithmetic of Boltz."""

from __future__ import annotations

import torch
from torch import Tensor


def random_augmentation(count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """A random rotation and shift for each sample.

    Args:
        count: samples M. like: gives dtype and device.

    Returns:
        (rotation [M, 3, 3], for coordinates as row vectors; shift [M, 1, 3] in angstrom, standard
        normal). Draws randn(M, 4), then randn(M, 1, 3).

    Source: AlphaFold 3 supplement, Algorithm 19.
    """
    rotation = rotation_matrix(torch.randn((count, 4), dtype=like.dtype, device=like.device))
    return rotation, torch.randn((count, 1, 3), dtype=like.dtype, device=like.device)


def rotation_matrix(quaternion: Tensor) -> Tensor:
    """Rotation matrices [M, 3, 3] of quaternions [M, 4] (real part first) of any length."""
    sign = torch.where(quaternion[:, :1] < 0, -1.0, 1.0)
    length = (quaternion * quaternion).sum(1, keepdim=True).sqrt()
    quaternion = quaternion / (length * sign)
    # 2 / |q|^2 once more: the division above leaves a rounding error in the length.
    two = 2.0 / (quaternion * quaternion).sum(-1)
    r, i, j, k = quaternion.unbind(-1)
    rows = (
        (1 - two * (j * j + k * k), two * (i * j - k * r), two * (i * k + j * r)),
        (two * (i * j + k * r), 1 - two * (i * i + k * k), two * (j * k - i * r)),
        (two * (i * k - j * r), two * (j * k + i * r), 1 - two * (i * i + j * j)),
    )
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def rigid_align(moving: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Rotate and shift `moving` onto `target` with the least weighted squared distance.

    Args:
        moving: [M, A, 3] in angstrom. target: [M, A, 3].
        weight: [M or 1, A], not negative.

    Returns:
        The moved coordinates [M, A, 3]. Clouds without a unique rotation (fewer than four atoms)
        get one of the best ones, without the warning that Boltz prints at every step: testing for
        them would make the host wait for the device.

    Source: AlphaFold 3 supplement, Algorithm 28; Kabsch 1976.
    """
    w = weight[..., None]
    total = w.sum(-2, keepdim=True)
    centre = (target * w).sum(-2, keepdim=True) / total
    moving = moving - (moving * w).sum(-2, keepdim=True) / total
    covariance = (w * (target - centre)).mT @ moving
    # As in Boltz the decomposition is never narrower than float32.
    narrow = covariance.dtype != torch.float64
    matrix = covariance.float() if narrow else covariance
    u, _, vh = torch.linalg.svd(matrix, driver="gesvd" if matrix.is_cuda else None)
    signs = torch.ones_like(matrix[..., 0])
    signs[..., -1] = torch.det(u @ vh)  # no mirror images
    rotation = ((u * signs[..., None, :]) @ vh).to(covariance.dtype)
    return moving @ rotation.mT + centre
