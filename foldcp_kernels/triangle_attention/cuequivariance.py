"""Run NVIDIA's cuEquivariance as an optional implementation of triangle attention.

Its kernels need a CUDA device; nothing here is imported unless it is asked for. Which of them runs
depends on what they are handed:

    sm_100, 103, 107   16-bit, bias in that dtype, keys a multiple of 8, lengths instead of a mask
    sm_120             the same, with any mask
    all others         bias in float32, any number of keys, any mask
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from foldcp_kernels.core.trial.cuequivariance import package
from foldcp_kernels.triangle_attention.masks import kept

_WITH_LENGTHS = ((10, 0), (10, 3), (10, 7))
_WITH_MASK = ((12, 0),)
_MULTIPLE = 8  # of the keys


def prepare(bias: Tensor, keep: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Bring the bias and the mask into the form that the chip's kernel reads, once for all lines.

    Args:
        bias: [B, H, J, K].
        keep: mask of all keys [B, I, K], bool or from 0 to 1; None keeps all.
        dtype: of the queries.

    Returns:
        The bias, contiguous, with zeros behind its keys where the kernel takes a multiple of them;
        and which keys count: bool [B, I, K], lengths int32 [B, I, 1], or None.
    """
    keep = None if keep is None else kept(keep, dtype)[0]
    chip, blackwell = _chip(bias.device), dtype in (torch.bfloat16, torch.float16)
    blackwell &= chip in _WITH_LENGTHS + _WITH_MASK
    if blackwell and keep is not None and chip in _WITH_LENGTHS:
        lengths = _lengths(keep)
        blackwell, keep = lengths is not None, keep if lengths is None else lengths
    if blackwell:
        return F.pad(bias.to(dtype), (0, -bias.shape[-1] % _MULTIPLE)).contiguous(), keep
    return bias.to(torch.promote_types(bias.dtype, torch.float32)).contiguous(), keep


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, keep: Tensor | None
) -> Tensor:
    """Compute the core of triangle attention.

    Args:
        q: [B, N, H, I, D].
        k: [B, N, H, K, D].
        v: [B, N, H, K, D].
        bias: [B, 1, H, I, K], or from `prepare` with more keys, which do not count.
        scale: on q . k.
        keep: keys, bool [B, N, K], True = keep, lengths from `prepare`, or None.

    Returns:
        [B, N, H, I, D].

    Raises:
        ValueError: the package cannot run.
    """
    keys = k.shape[3]
    more = bias.shape[-1] - keys
    mask = lengths = None
    if keep is not None and keep.dtype == torch.int32:
        lengths = keep[:, :, None, None]
    elif keep is not None:
        mask = F.pad(keep, (0, more))[:, :, None, None]
    elif more:
        shape = (*k.shape[:2], 1, 1, 1)
        lengths = torch.full(shape, keys, dtype=torch.int32, device=k.device)
    if more:
        k, v = (F.pad(x, (0, 0, 0, more)) for x in (k, v))
    out: Tensor = package().triangle_attention(
        q, k, v, bias, mask=mask, scale=scale, kv_lengths=lengths
    )
    return out


def _chip(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0, 0
    return torch.cuda.get_device_capability(device)


def _lengths(keep: Tensor) -> Tensor | None:
    """Count the keys of each line that keeps its first ones: int32 [B, I, 1].

    Returns:
        None where a line keeps others, or where that cannot be read because a graph is recorded.
    """
    if keep.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    lengths = keep.sum(-1, keepdim=True, dtype=torch.int32)
    prefix = torch.arange(keep.shape[-1], device=keep.device) < lengths
    return lengths if bool((prefix == keep).all()) else None
