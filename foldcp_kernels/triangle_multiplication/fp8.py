"""Scale the planes of a triangle multiplication so that they travel and multiply as FP8 (e4m3).

    |LN(z) w_c| <= sqrt(C) |w_c * gain| + |w_c . shift|     and a gate or a mask only lowers it

A channel's scale is the smallest power of two that brings this bound to at most 448, the largest
e4m3 number. It follows from the weights alone, so that no plane can overflow, no pass over data is
needed, and planes do not depend on how a tile is cut. Powers of two leave the rounding as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from foldcp_kernels.core import trial
from foldcp_kernels.core.dispatch import check_dtype
from foldcp_kernels.core.weight_cache import derived

FORMATS = ("same", "fp8")  # of what is contracted; "same" as the projections
DTYPE = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
OLDEST_GPU = 89  # with e4m3 products
_RANGE = 60  # of exponents: products of two scales are float32 numbers, and so are their inverses


@dataclass(frozen=True)
class Scaled:
    """FP8 planes of some channels: what contracts them, and into what.

    Args:
        runner: "torch" or "triton".
        scale: of the product of a and b [d], float32.
        dtype: of the result of one panel.
    """

    runner: str
    scale: Tensor
    dtype: torch.dtype


def fault(z: Tensor) -> str | None:
    """Return the reason why Triton cannot contract FP8 planes of a tile, None where it can.

    Args:
        z: the tile.
    """
    if trial.package_fault():
        return trial.package_fault()
    from foldcp_kernels.core.triton_launch import capability

    chip = capability(z.device)  # 0 in the interpreter
    if 0 < chip < OLDEST_GPU:
        return (
            f"an sm_{chip} GPU has no FP8 products; expected sm_{OLDEST_GPU} or newer: use "
            "contraction='same'"
        )
    return check_dtype(z, "z")


def channel_scales(p_in: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """Compute the scale of each plane: a power of two, 1 where the weights are 0 or not finite.

    Args:
        p_in: weight of the planes [2D, C].
        gain: of the LayerNorm before it [C].
        shift: of the LayerNorm before it [C].

    Returns:
        [2D], float64.
    """
    w, channels = p_in.double(), p_in.shape[1]
    bound = sqrt(channels) * (w * gain.double()).norm(dim=1) + (w @ shift.double()).abs()
    mantissa, exponent = torch.frexp(bound / LARGEST)
    exponent = exponent - (mantissa == 0.5).to(exponent.dtype)  # the least at or above it
    known = bound.isfinite() & (bound > 0)
    exponent = torch.where(known, exponent, torch.zeros_like(exponent)).clamp(-_RANGE, _RANGE)
    return torch.ldexp(torch.ones_like(bound), exponent)


def scaled_weight(p_in: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """Return the weight whose planes are divided by their scales; made once while it lives.

    Args:
        p_in: as of `channel_scales`.
        gain: as of `channel_scales`.
        shift: as of `channel_scales`.
    """

    def build(p_in: Tensor, *norm: Tensor) -> Tensor:
        return (p_in.double() / channel_scales(p_in, *norm)[:, None]).to(p_in.dtype)

    return derived("fp8 planes", (p_in, gain, shift), build)


def product_scales(p_in: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """Return what products of FP8 planes are multiplied by: [D], float32.

    Args:
        p_in: as of `channel_scales`.
        gain: as of `channel_scales`.
        shift: as of `channel_scales`.
    """

    def build(*weights: Tensor) -> Tensor:
        a, b = channel_scales(*weights).chunk(2)
        return (a * b).float()

    return derived("fp8 products", (p_in, gain, shift), build)
