"""The state that attention carries from one set of keys to the next.

A softmax over some keys is kept as what it made and the log of its sum, and that log in two parts,
lse = r + m + log l. The reference r is a bias of the row, exactly; m + log l is what the largest
logit less r and the number of keys come to. One float32 could not hold both: beside a bias of -1e9
its spacing is 64, and the number of keys would be lost.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Beyond this bias float64 itself cannot hold q . k beside it (its spacing there is 1 and more):
# rows whose largest bias is beyond are weighed by their biases alone.
ABSORBED = 2.0**53


class Carry(NamedTuple):
    """Partial attention over some keys; a key's weight is exp(logit - r - m).

    Args:
        o: weighted sum of values [..., I, D], float32 or wider while it is carried.
        r: reference of the logits [..., I], natural log, float32 or wider, without gradient.
        m: bound of the logits less r [..., I], natural log.
        l: sum of weights [..., I]; None stands for 1: o is the result and r + m the lse.
    """

    o: Tensor
    r: Tensor
    m: Tensor
    l: Tensor | None  # noqa: E741  # the name that the literature uses

    def finish(self) -> tuple[Tensor, Tensor]:
        """Finish the attention: (o / l, lse)."""
        if self.l is None:
            return self.o, self.r + self.m
        return self.o / self.l[..., None], self.r + (self.m + self.l.log())

    def lowered(self, by: Tensor) -> Carry:
        """Lower the logits by `by` [..., I]: what rounding takes from r goes to m."""
        r = self.r - by
        part = r - self.r
        return self._replace(r=r, m=self.m + ((self.r - (r - part)) - (by + part)))


def merge(carry: Carry | None, new: Carry) -> Carry:
    """Combine partial results over two disjoint key sets.

    Args:
        carry: so far, None at the start.
        new: over more keys.

    Returns:
        The partial result over the union; `o` in float32 or wider.

    Source: FlashAttention (Dao et al. 2022), section 3.1.
    """
    if carry is None:
        return new
    rise = (new.r - carry.r) + (new.m - carry.m)
    with torch.no_grad():
        higher = rise > 0
        r = torch.where(higher, new.r, carry.r)
        # Whichever bound the union takes, its result is the same: no gradient through it.
        m = torch.where(higher, new.m, carry.m)
    o, total = 0, 0
    for part in (carry, new):
        w = ((part.r - r) + (part.m - m)).exp()
        o = o + part.o * w[..., None]
        total = total + (w if part.l is None else part.l * w)
    return Carry(o, r, m, total)


def merge_all(o: Tensor, r: Tensor, m: Tensor) -> Tensor:
    """Combine Q finished partial results stacked along dim 0.

    Args:
        o: [Q, ..., D].
        r: [Q, ...], of `Carry`; the least r marks a partial without keys.
        m: [Q, ...], of `Carry`; -inf marks a partial without keys.

    Returns:
        [..., D].
    """
    r = r.detach()
    return (o * ((r - r.amax(0)) + m).softmax(0)[..., None].to(o.dtype)).sum(0)
