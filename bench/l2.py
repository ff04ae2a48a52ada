"""Device memory that an attention kernel reads, from the very order in which its programs run.

P programs run at a time (multiprocessors by programs on each, bench/occupancy.py), in waves and in
step: all go through their loop at the same pace, a part of it at a time. What a wave reads of one
panel is read once; a panel that an earlier wave left in L2 is not read again (least recently used
goes first). Of the L2 half counts: large chips have two halves, and what both need lies in both. A
model, not a measurement: real programs drift apart.

    python -m bench.l2        # what other sizes of a group would read
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache

from bench import shapes
from foldcp_kernels.core.triton_configs import candidates

PARTS = 8  # of a loop: how finely programs are followed
WAVES = 400  # followed at most: they repeat


@dataclass(frozen=True)
class Grid:
    """Programs of one launch and what each reads in its loop.

    Args:
        blocks: as in `place_program` (one batch).
        heads: as in `place_program` (one batch).
        groups: as in `place_program` (one batch).
        group: its GROUP; with 1, all blocks of one head and group are side by side.
        block_bytes: of the panel that all groups share (the bias of a query block).
        group_bytes: of the panel that all blocks share (keys and values of the lines).
        once_bytes: read or written by one program alone.
    """

    blocks: int
    heads: int
    groups: int
    group: int
    block_bytes: int
    group_bytes: int
    once_bytes: int

    @property
    def programs(self) -> int:
        """How many there are."""
        return self.blocks * self.heads * self.groups


@lru_cache
def traffic(grid: Grid, at_a_time: int, l2_bytes: float) -> float:
    """Bytes read from or written to device memory by one launch.

    Args:
        grid: of the launch.
        at_a_time: programs that run at the same time.
        l2_bytes: of the chip; half of it counts.
    """
    from foldcp_kernels.attention.order import place_program

    total, sides = grid.programs, (grid.blocks, grid.heads, grid.groups, grid.group)
    followed = min(total, WAVES * at_a_time)
    sizes = {"block": grid.block_bytes / PARTS, "group": grid.group_bytes / PARTS}
    held: OrderedDict[tuple, float] = OrderedDict()
    used = moved = 0.0
    for first in range(0, followed, at_a_time):
        panels = set()
        for program in range(first, min(first + at_a_time, followed)):
            block, head, _, group = place_program.fn(program, *sides)
            panels |= {("block", head, block), ("group", head, group)}
        for part in range(PARTS):
            for panel in sorted(panels):
                key, size = (panel, part), sizes[panel[0]]
                if key in held:
                    held.move_to_end(key)
                    continue
                held[key] = size
                moved, used = moved + size, used + size
                while used > l2_bytes / 2:
                    used -= held.popitem(last=False)[1]
    return moved * total / followed + total * grid.once_bytes


def forward(n: int, lines: int, heads: int, d: int, blocks: dict[str, int], e: int) -> Grid:
    """The grid of an attention of n queries to n keys with one bias; `blocks` of its configuration.

    Args:
        n: queries and keys.
        lines: batch rows that share the bias.
        heads: attention heads.
        d: width of a head.
        blocks: ROWS, GROUP, BI.
        e: bytes of an element.
    """
    rows, bi = blocks["ROWS"], blocks["BI"]
    return Grid(
        -(-n // bi), heads, -(-lines // rows), blocks["GROUP"],
        block_bytes=bi * n * e, group_bytes=2 * rows * n * d * e, once_bytes=2 * rows * bi * d * e,
    )  # fmt: skip


def backward(name: str, n: int, heads: int, d: int, blocks: dict[str, int], e: int) -> Grid:
    """The grid of "dq", "dkv" or "dbias" for n lines of n queries and n keys with one bias."""
    bi, bk, group = blocks["BI"], blocks["BK"], blocks["GROUP"]
    line = 2 * n * d * e  # two panels of one line: k and v, or q and dout
    if name == "dq":
        return Grid(-(-n // bi), heads, n, group, bi * n * e, line, 3 * bi * d * e)
    if name == "dkv":
        return Grid(-(-n // bk), heads, n, group, bk * n * e, line, 4 * bk * d * e)
    # Blocks of keys beside blocks of queries, all lines in the loop; bias and its float32 gradient.
    key, query = bk * line, bi * line
    return Grid(-(-n // bk), heads, -(-n // bi), group, key, query, bi * bk * (e + 4))


# op -> (kernel, heads, width of a head, batch rows that share a bias; None: one for each token).
_WITH_BIAS = {
    "triangle_attention_core": ("attention_32", shapes.HEADS, shapes.HEAD_DIM, None),
    "token_attention_diffusion": (
        "attention_64", shapes.TOKEN_HEADS, shapes.DIFFUSION_DIM, shapes.SAMPLES
    ),
}  # fmt: skip


def memory_gb(op: str, n: int, sms: int, l2_mb: int) -> dict[str, str]:
    """GB that attention moves on a Hopper chip, as its programs run and ungrouped; else empty.

    Args:
        op: as in bench.shapes.
        n: tokens.
        sms: multiprocessors.
        l2_mb: of the chip, 10^6 bytes.
    """
    found = dict.fromkeys(("hbm_gb_modelled", "hbm_gb_ungrouped_modelled"), "")
    if op not in _WITH_BIAS:
        return found
    kernel, heads, d, lines = _WITH_BIAS[op]
    config = candidates(kernel, 2, "sm_90")[0]
    # Eight warps on a multiprocessor: what their registers allow (bench/results/aot.csv).
    at_a_time = sms * 8 // config.warps
    for column, group in zip(found, (config.blocks["GROUP"], 1), strict=True):
        grid = forward(n, lines or n, heads, d, config.blocks | {"GROUP": group}, 2)
        found[column] = f"{traffic(grid, at_a_time, l2_mb * 1e6) / 1e9:.4g}"
    return found


def main() -> None:
    """Print what several sizes of a group read on an H100."""
    for n in (1024, 2048, 4096):
        found = []
        for group in (1, 4, 8, 12, 16, 24, 32):
            blocks = {"ROWS": 2, "GROUP": group, "BI": 128}
            gb = traffic(forward(n, n, 4, 32, blocks, 2), 132, 50e6) / 1e9
            found.append(f"{group}: {gb:.1f}")
        print(f"N={n}, GB by GROUP, modelled: {', '.join(found)}")
        for name, bi, bk in (("dq", 64, 32), ("dkv", 64, 64), ("dbias", 64, 32)):
            found = []
            for group in (1, 4, 8, 16, 32):
                grid = backward(name, n, 4, 32, {"GROUP": group, "BI": bi, "BK": bk}, 2)
                found.append(f"{group}: {traffic(grid, 396, 50e6) / 1e9:.1f}")
            print(f"  {name}: {', '.join(found)}")


if __name__ == "__main__":
    main()
