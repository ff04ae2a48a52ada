"""Random rotations and rigid alignment of coordinates, with the draws of Boltz; nothing syncs."""

from __future__ import annotations

import torch
from torch import Tensor

# One or two atoms can be turned about an axis for free. The result then hangs on the decomposition,
# and padding atoms, which are turned too, feed it back through the mean of all atoms.
MIN_ATOMS = 3

# Horn's symmetric matrix as sums of elements of the covariance of (target, moving).
_HORN = (
    ("+xx+yy+zz", "+zy-yz", "+xz-zx", "+yx-xy"),
    ("+zy-yz", "+xx-yy-zz", "+xy+yx", "+xz+zx"),
    ("+xz-zx", "+xy+yx", "-xx+yy-zz", "+yz+zy"),
    ("+yx-xy", "+xz+zx", "+yz+zy", "-xx-yy+zz"),
)
# No eigenvalue of Horn's matrix is further from 0 than this times the norm of the covariance.
_BOUND = 3**0.5
_ROUNDS, _SQUARINGS = 6, 7  # to the power 2^42 in all
_TINY = 1e-200


def augmentation_shapes(count: int) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """Return the shapes of the numbers of a random rotation and shift for each of M samples.

    They are standard normal, and drawn in this order: quaternions [M, 4] for `rotation_matrix`,
    shifts [M, 1, 3] in angstrom.

    Source: AlphaFold 3 supplement, Algorithm 19.
    """
    return (count, 4), (count, 1, 3)


def random_augmentation(count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Make a rotation [M, 3, 3], for row vectors, and a shift, see `augmentation_shapes`.

    Args:
        count: M.
        like: gives dtype and device.
    """
    quaternion, shift = (
        torch.randn(shape, dtype=like.dtype, device=like.device)
        for shape in augmentation_shapes(count)
    )
    return rotation_matrix(quaternion), shift


def rotation_matrix(quaternion: Tensor) -> Tensor:
    """Turn quaternions [M, 4] (real part first) of any length into rotation matrices [M, 3, 3]."""
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


class Superposition:
    """Rigid alignment with fixed weights; a call does not make the host wait for the device.

    Args:
        weight: [M or 1, A], not negative.
        atoms: how many atoms have a weight, a number that the host knows. With fewer than three
            the result is that of Boltz's singular value decomposition, and calls do wait.

    Source: AlphaFold 3 supplement, Algorithm 28; Kabsch 1976; Horn 1987.
    """

    def __init__(self, weight: Tensor, atoms: int) -> None:
        self.weight = weight[..., None]
        self.total = self.weight.sum(-2, keepdim=True)
        self.unique = atoms >= MIN_ATOMS
        signs = [_signs(entry) for row in _HORN for entry in row]
        self._horn = torch.tensor(signs, dtype=torch.float64, device=weight.device).mT.contiguous()
        self._one = torch.eye(4, dtype=torch.float64, device=weight.device)

    def __call__(self, moving: Tensor, target: Tensor) -> Tensor:
        """Rotate and shift `moving` onto `target` with the least weighted squared distance.

        Args:
            moving: [M, A, 3] in angstrom.
            target: [M, A, 3].

        Returns:
            The moved coordinates [M, A, 3].
        """
        w = self.weight
        centre = (target * w).sum(-2, keepdim=True) / self.total
        moving = moving - (moving * w).sum(-2, keepdim=True) / self.total
        covariance = (w * (target - centre)).mT @ moving
        rotation = self._best(covariance.double()) if self.unique else _kabsch(covariance)
        return moving @ rotation.mT.to(moving.dtype) + centre

    def _best(self, covariance: Tensor) -> Tensor:
        """The proper rotation R [M, 3, 3] with the largest trace of R^T covariance.

        Its quaternion q is the top eigenvector of Horn's matrix. Shifted so that no eigenvalue is
        negative, the matrix keeps q, and a high power of it is q q^T but for a factor.
        """
        x = (covariance.flatten(1) @ self._horn).unflatten(1, (4, 4))
        norm = covariance.square().sum((1, 2), keepdim=True).sqrt()
        x = x + (_BOUND * norm + _TINY) * self._one
        for _ in range(_ROUNDS):
            # With trace 1 the top eigenvalue is at least 1/4: 2^-256 does not underflow.
            x = x / x.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
            for _ in range(_SQUARINGS):
                x = torch.bmm(x, x)
        # Every column is a multiple of q; the largest is the most exact one.
        column = x.diagonal(dim1=1, dim2=2).argmax(1)[:, None, None].expand(-1, 4, 1)
        q = x.gather(2, column)
        q = q / q.square().sum(1, keepdim=True).sqrt()
        # Horn's matrix holds <q q^T, matrix> = <R, covariance>: its transpose takes q q^T to R.
        return ((q * q.mT).flatten(1) @ self._horn.mT).unflatten(1, (3, 3))


def _signs(entry: str) -> list[float]:
    """The factors of the nine elements of a matrix in a sum such as "+xx-yy"."""
    out = [0.0] * 9
    for sign, row, col in zip(entry[::3], entry[1::3], entry[2::3], strict=True):
        out[3 * "xyz".index(row) + "xyz".index(col)] = 1.0 if sign == "+" else -1.0
    return out


def _kabsch(covariance: Tensor) -> Tensor:
    """Superpose by the decomposition that Boltz uses, see `Superposition._best`; syncs the host."""
    # As in Boltz it is never narrower than float32.
    matrix = covariance if covariance.dtype == torch.float64 else covariance.float()
    u, _, vh = torch.linalg.svd(matrix, driver="gesvd" if matrix.is_cuda else None)
    signs = torch.ones_like(matrix[..., 0])
    signs[..., -1] = torch.det(u @ vh)  # no mirror images
    return (u * signs[..., None, :]) @ vh
