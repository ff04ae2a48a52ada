"""Attend lines to panels of keys, step by step: the inner loop of both strategies of attention."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from foldcp.layout.tiles import PairLayout, Span
from foldcp.layout.triangle_plans import key_panels
from foldcp_kernels.attention.carry import Carry
from foldcp_kernels.triangle_attention import attend_lines
from foldcp_kernels.triangle_attention.lines import Lines

Panel = tuple[Tensor, Tensor, Tensor | None]  # k and v, bias, which keys count


def attend_step(
    step: int,
    lines: Lines,
    take: Callable[[Span], Panel],
    carry: Carry | None,
    layout: PairLayout,
) -> Carry | None:
    """Attend lines to the keys of one step; keys that are padding alone add nothing.

    Args:
        step: of this rank.
        lines: from `project_lines` or `project_normed`.
        take: returns the panel, cut to its real keys, given their tokens.
        carry: over the steps so far, None before the first.
        layout: the tiling.

    Returns:
        The new carry; never None after the last step.
    """
    spans = key_panels(layout)
    lo, hi = spans[step]
    if lo == hi:
        return carry
    last = all(lo == hi for lo, hi in spans[step + 1 :])
    kv, bias, keep = take((lo, hi))
    return attend_lines(lines, kv, bias, keep, carry, last)
