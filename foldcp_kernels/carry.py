"""What attention carries from one panel of keys to the next."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Carry(NamedTuple):
    """Partial attention over some keys: result o / l, log-sum-exp m + log l.

    Args:
        o: weighted sum of values [..., I, D], float32 or wider while it is carried.
        m: bound that logits are taken relative to [..., I], natural log, float32 or wider.
        l: sum of weights [..., I]; None stands for 1: o is the result and m the lse.
    """

    o: Tensor
    m: Tensor
    l: Tensor | None  # noqa: E741  # the name that the literature uses

    def finish(self) -> tuple[Tensor, Tensor]:
        """(o / l, lse)."""
        if self.l is None:
            return self.o, self.m
        return self.o / self.l[..., None], self.m + self.l.log()


def merge(carry: Carry | None, new: Carry) -> Carry:
    """Combine partial results over two disjoint key sets.

    Args:
        carry: so far, None at the start. new: over more keys.

    Returns:
        The partial result over the union; `o` in float32 or wider.

    Source: FlashAttention (Dao et al. 2022), section 3.1.
    """
    if carry is None:
        return new
    m = torch.maximum(carry.m, new.m)
    o, total = 0, 0
    for part in (carry, new):
        w = (part.m - m).exp()
        o = o + part.o * w[..., None]
        total = total + (w if part.l is None else part.l * w)
    return Carry(o, m, total)


def merge_all(o: Tensor, lse: Tensor) -> Tensor:
    """Combine Q finished partial results stacked along dim 0.

    Args:
        o: [Q, ..., D]. lse: [Q, ...]; -inf marks a partial without keys.

    Returns:
        [..., D].
    """
    return (o * lse.softmax(0)[..., None].to(o.dtype)).sum(0)
