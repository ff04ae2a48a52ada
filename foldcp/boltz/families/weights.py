"""Check that the weights which the ranks loaded are sound, and the same everywhere."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn

from foldcp.errors import UserError
from foldcp.runtime.session import Session


def check(model: nn.Module, path: str | Path) -> str:
    """Look at every weight of a loaded model.

    Args:
        model: with its weights.
        path: of its checkpoint.

    Returns:
        A fingerprint of the weights: sums per tensor, so that it costs one pass over them.

    Raises:
        UserError: a weight is not finite; names it.
    """
    sums = hashlib.sha256()
    for name, weight in model.state_dict().items():
        if not weight.is_floating_point():
            continue
        total = weight.sum(dtype=torch.float64)
        # A sum may overflow by itself: only then look at each element.
        if not torch.isfinite(total) and not torch.isfinite(weight).all():
            bad = int((~torch.isfinite(weight)).sum())
            raise UserError(
                f"the checkpoint {path} is damaged: {name} holds {bad} NaN or infinite value(s) of "
                f"{weight.numel()}: delete the file to have Boltz download it again, or pass "
                "--checkpoint with a sound one"
            )
        sums.update(name.encode() + total.numpy().tobytes() + str(tuple(weight.shape)).encode())
    return sums.hexdigest()[:16]


def check_same(fingerprint: str, path: str | Path, session: Session) -> None:
    """Compare what `check` gave on all ranks.

    Args:
        fingerprint: of this rank.
        path: of the checkpoint.
        session: the ranks.

    Raises:
        UserError: on every rank: they differ.
    """
    for rank, other in enumerate(session.gather(fingerprint)):
        if other != fingerprint:
            raise UserError(
                f"rank {rank} loaded other weights than rank {session.place.rank} from {path}: "
                "give every rank the same checkpoint (--checkpoint, --cache)"
            )
