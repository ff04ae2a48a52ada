"""The order in which the programs of an attention kernel run, so that they share what L2 holds.

A program reads one panel that all `groups` share (the bias of its query block) and one that all
`blocks` share (the keys and values of its lines). Programs that run at the same time are neighbours
in this order: about GROUP groups by as many blocks as fit, so that a wave of P programs reads
GROUP + P / GROUP panels and not P. `bench.l2` models what that means for device memory.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place_program(i_program, blocks, heads, groups, GROUP: tl.constexpr):
    """Place a program: (block, head, batch, group); also runs on plain integers, as `.fn`.

    From the fastest: GROUP groups (the last ones may be fewer), blocks, heads, sets of GROUP
    groups, batches.
    """
    of_batch = groups * heads * blocks
    i_b, rest = i_program // of_batch, i_program % of_batch
    of_set = GROUP * heads * blocks
    first, rest = rest // of_set * GROUP, rest % of_set
    side = min(GROUP, groups - first)
    of_head = side * blocks
    i_h, rest = rest // of_head, rest % of_head
    return rest // side, i_h, i_b, first + rest % side
