"""Count what the pair ops of a block hold beside z."""

from __future__ import annotations

from foldcp.layout.cuts import (
    GROUPS,
    LEAN_GROUPS,
    by_strips,
    channel_groups,
    channel_pieces,
    channel_widths,
)
from foldcp.layout.strategies import ATTENTION, MULTIPLICATION, Sizes
from foldcp.planner.choice import chunk_count
from foldcp.planner.stage_memory.terms import FLOAT32, Case


def sizes(case: Case) -> Sizes:
    """Return the sizes of the ops on pairs."""
    d, s = case.dims, case.setup
    return Sizes(s.z_itemsize, case.itemsize, d.token_z, d.pair_heads, s.wire, case.lean)


def _count(case: Case, op: str, name: str) -> int:
    s = case.setup
    shape = s.rows, s.cols
    return chunk_count(op, name, case.layout.padded, shape, sizes(case), chunk_bytes=s.chunk_bytes)


def panel_product(case: Case) -> int:
    """Count triangle multiplication over panels.

    Product of all channels, planes of two groups of them (of all where there is one), the sum of a
    piece in float32 and as it is kept, and buffers of panels.
    """
    lay, e, c = case.layout, case.itemsize, case.dims.token_z
    groups = channel_groups(lay, c, e, case.setup.chunk_bytes, case.lean)
    group, plane = groups[0][1], e * case.pairs
    if lay.size == 1:
        return (c + 2 * group + (group if len(groups) > 1 else 0)) * plane
    planes = min(2, len(groups)) * 2 * group * plane
    pieces = channel_pieces(lay, group, e, case.setup.chunk_bytes)
    piece = -(-group // pieces)
    sums = piece * case.pairs * (FLOAT32 + e)
    whole = c * plane if len(groups) * pieces > 1 else 0  # else the sum is the product
    panel = piece * (lay.padded // lay.panels) * (lay.tile_rows + lay.tile_cols) * e
    return whole + planes + sums + round(panel * _panel_buffers(case, len(groups), pieces))


def _panel_buffers(case: Case, groups: int, pieces: int) -> float:
    """Two panels of a group and the first of the next; what packs a whole panel is empirical."""
    if groups > 1:
        return 3
    packed = 0.75 if by_strips(case.layout) else 1.2
    return 2 + (packed if pieces == 1 else 0)


def channel_product(case: Case) -> int:
    """Count triangle multiplication over channels.

    Product of all channels, planes of a group (of two on a mesh of one row or column), and planes
    and products of this chunk and its neighbours: nine widths of a chunk, empirical.
    """
    lay, whole = case.layout, case.dims.token_z
    widths = channel_widths(lay, whole, _count(case, MULTIPLICATION, "channel"))
    group = min(whole, widths[0] * -(-len(widths) // (LEAN_GROUPS if case.lean else GROUPS)))
    if 1 in (lay.mesh_rows, lay.mesh_cols):
        held = 4 * group + 7 * widths[0]
    else:
        held = 2 * group + (9 if len(widths) > 2 else 7) * widths[0]
    return (whole + held) * case.itemsize * case.pairs


def multiplication(case: Case) -> int:
    """Count triangle multiplication, by its strategy."""
    if case.setup.multiplication != "channel" or case.layout.size == 1:
        return panel_product(case)
    return channel_product(case)


def attention(case: Case) -> int:
    """Count triangle attention, by its strategy; on one rank queries, keys, values, results."""
    lay, d, e = case.layout, case.dims, case.itemsize
    if lay.size == 1:
        each = 4 * e * lay.tile_cols * d.token_z
        return bias(case) + each * case.chunk(lay.tile_rows, each, 16, uncut=True)
    if case.setup.attention == "rows":
        return whole_lines(case)
    return max(panels_of_keys(case, starting) for starting in (True, False))


def bias(case: Case) -> int:
    """Count the bias of a tile, all heads."""
    return case.dims.pair_heads * case.itemsize * case.pairs


def panels_of_keys(case: Case, starting: bool) -> int:
    """Count triangle attention over panels.

    Of a chunk of lines: queries, keys and values, the sum in float32, a panel's result, largest
    logits and sums of weights; two panels of keys and values with their bias. With several chunks
    queries, keys, values and the first panel of the next one.

    Args:
        case: the prediction.
        starting: the lines are rows; else columns.
    """
    lay, d, e = case.layout, case.dims, case.itemsize
    count = _count(case, ATTENTION, case.setup.attention)
    lines, width = (lay.tile_rows, lay.tile_cols) if starting else (lay.tile_cols, lay.tile_rows)
    chunk, panel = -(-lines // count), lay.padded // lay.panels
    several = 1 if count > 1 else 0
    line = width * (d.token_z * (e * (3 * (1 + several) + 1) + FLOAT32) + 12 * d.pair_heads)
    arrives = chunk * panel * 2 * d.token_z * e + panel * width * d.pair_heads * e
    return chunk * line + (2 + several) * arrives + bias(case)


def whole_lines(case: Case) -> int:
    """Count triangle attention over whole lines.

    Of a chunk: queries, keys and values, the sum in float32, two results, normed lines of this
    chunk and of the next, sent and received, and results on their way back; three panels of the
    bias of all queries.
    """
    lay, d, e = case.layout, case.dims, case.itemsize
    count = _count(case, ATTENTION, "rows")
    share = -(-lay.shard // count) / lay.shard
    tensors = 9 if count > 2 else 5 + count  # fewer chunks have fewer neighbours
    lines = share * case.pairs * (d.token_z * (tensors * e + FLOAT32) + 12 * d.pair_heads)
    panel = lay.padded * (lay.padded // lay.panels) * d.pair_heads * e
    return round(lines) + 3 * panel + bias(case)


def pair_ops(case: Case) -> int:
    """Count the largest of the pair ops of a block."""
    return max(multiplication(case), attention(case))
