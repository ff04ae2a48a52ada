"""Count what the pair ops of a block hold beside z."""

from __future__ import annotations

from foldcp.layout.cuts import channel_groups, channel_pieces, tiles_held
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
    return chunk_count(
        op, name, case.layout.padded, shape, sizes(case), chunk_bytes=s.chunk_bytes
    )


def panel_product(case: Case) -> int:
    """Count triangle multiplication over panels.

    Product of all channels, planes of two groups of them (of all where there is one), the sum of a
    piece in float32 and as it is kept, and three buffers of panels: two that arrive, one packed.
    """
    lay, e, c = case.layout, case.itemsize, case.dims.token_z
    groups = channel_groups(lay, c, e, case.setup.chunk_bytes, case.lean)
    group, plane = groups[0][1], e * case.pairs
    product = c * plane
    if lay.size == 1:
        return product + (2 * group + (group if len(groups) > 1 else 0)) * plane
    planes = min(2, len(groups)) * 2 * group * plane
    piece = -(-group // channel_pieces(lay, group, e, case.setup.chunk_bytes))
    sums = piece * case.pairs * (FLOAT32 + e)
    panels = piece * (lay.padded // lay.panels) * (lay.tile_rows + lay.tile_cols) * e
    return product + planes + sums + 3 * panels


def multiplication(case: Case) -> int:
    """Count triangle multiplication, by its strategy."""
    if case.setup.multiplication != "channel" or case.layout.size == 1:
        return panel_product(case)
    count = _count(case, MULTIPLICATION, "channel")
    return round(case.tile * tiles_held("channel", case.layout, count))


def attention(case: Case) -> int:
    """Count triangle attention, by its strategy; on one rank queries, keys, values, results."""
    lay, d, e = case.layout, case.dims, case.itemsize
    if lay.size == 1:
        each = 4 * e * lay.tile_cols * d.token_z
        return bias(case, 1) + each * case.chunk(lay.tile_rows, each, 16, uncut=True)
    if case.setup.attention == "rows":
        return whole_lines(case)
    return max(panels_of_keys(case, starting) for starting in (True, False))


def bias(case: Case, ranks: float) -> int:
    """Count the bias of so many tiles."""
    return round(ranks * case.dims.pair_heads * case.itemsize * case.pairs)


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
    return chunk * line + (2 + several) * arrives + bias(case, 1)


def whole_lines(case: Case) -> int:
    """Count triangle attention over whole lines.

    Of a chunk: queries, keys and values, the sum in float32, two results, normed lines of this
    chunk and of the next, sent and received, and results on their way back; three panels of the
    bias of all queries.
    """
    lay, d, e = case.layout, case.dims, case.itemsize
    share = -(-lay.shard // _count(case, ATTENTION, "rows")) / lay.shard
    lines = share * case.pairs * (d.token_z * (9 * e + FLOAT32) + 12 * d.pair_heads)
    panel = lay.padded * (lay.padded // lay.panels) * d.pair_heads * e
    return round(lines) + 3 * panel + bias(case, 1)


def pair_ops(case: Case) -> int:
    """Count the largest of the pair ops of a block."""
    return max(multiplication(case), attention(case))
