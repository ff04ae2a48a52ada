"""What the innermost loop of a compiled kernel issues, read from its disassembly.

On an SM sub-partition a warp instruction takes one issue slot, and a special-function one (MUFU,
exponentials) occupies its unit for eight: 4 lanes a clock. A loop that issues no more than eight
times its MUFU instructions can run at the rate of the exponentials, which is what bounds attention
with small head dims. Source: CUDA C++ Programming Guide, throughput of native instructions (16
special functions and 128 issue lanes a clock and SM for compute capability 9.0).
"""

from __future__ import annotations

import re
from collections import Counter

MUFU_SLOTS = 8
_LABEL = re.compile(r"^(\.L_\w+):")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L_\w+)\)")
_OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)")
_RARE = 60  # lines: a branch over more than this skips what the loop seldom does


def hot_loop(sass: str) -> Counter[str]:
    """Opcodes of the main loop, without what a forward branch inside it skips.

    Args:
        sass: output of `nvdisasm -c`.

    Returns:
        Number of instructions by opcode; empty without a loop.
    """
    lines = sass.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := _LABEL.match(line))}
    jumps = [
        (i, labels[m[1]])
        for i, line in enumerate(lines)
        if (m := _BRANCH.search(line)) and m[1] in labels
    ]
    loops = [(to, at) for at, to in jumps if to < at]
    if not loops:
        return Counter()
    # Of loops alike in length the first: what follows it are its masked ends.
    longest = max(last - first for first, last in loops)
    first, last = min(x for x in loops if 2 * (x[1] - x[0]) > longest)
    rare = {
        i
        for at, to in jumps
        if first < at < to <= last and to - at > _RARE
        for i in range(at + 1, to)
    }
    found = (_OPCODE.search(lines[i]) for i in range(first, last + 1) if i not in rare)
    return Counter(m[1] for m in found if m)


def issue_ratio(sass: str) -> float | None:
    """Issue slots of the main loop over the slots that its exponentials take; None without any.

    Args:
        sass: output of `nvdisasm -c`.
    """
    ops = hot_loop(sass)
    if not ops["MUFU"]:
        return None
    return sum(ops.values()) / (MUFU_SLOTS * ops["MUFU"])
