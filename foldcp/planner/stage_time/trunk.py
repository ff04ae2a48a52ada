"""Model the ops of the trunk: blocks of pairs, the single track, the alignment, templates."""

from __future__ import annotations

from math import ceil

from foldcp.layout.strategies import ATTENTION, MULTIPLICATION
from foldcp.planner.stage_time.parts import FLOAT32, Case, Part


def transition(case: Case, rows: float, channels: int, widening: int, itemsize: int) -> Part:
    """Model a transition.

    Args:
        case: the prediction.
        rows: that it transforms.
        channels: of each.
        widening: hidden channels over channels.
        itemsize: of the operands.
    """
    hidden = widening * channels
    moved = rows * channels * (case.setup.z_itemsize + FLOAT32)
    flops = 6 * rows * channels * hidden
    return case.kernel("transition", flops, moved, rows * hidden, itemsize, launches=1)


def pair_block(case: Case, channels: int) -> Part:
    """Model the pair ops of a block.

    Args:
        case: the prediction.
        channels: of its pairs.
    """
    s, d = case.setup, case.dims
    # Heads of attention keep their width where pairs have fewer channels.
    inner = d.pair_heads * d.head_width if channels != d.token_z else channels
    return (
        case.triangle(MULTIPLICATION, s.multiplication, channels)
        + case.triangle(ATTENTION, s.attention, inner)
        + transition(case, case.tile, channels, d.widening, s.itemsize)
    )


def single_track(case: Case) -> Part:
    """Model the single track of a block, in float32."""
    d, lay, pairs = case.dims, case.layout, case.tile
    c, h, shard = d.token_s, d.single_heads, case.layout.shard
    bias = case.kernel(
        "pair_rows",
        2 * pairs * d.token_z * h,
        pairs * (d.token_z * case.setup.z_itemsize + 2 * h * FLOAT32),
        launches=1,
    )
    linears = case.kernel("linear", 10 * shard * c * c, 14 * shard * c * FLOAT32, 0, 4, calls=13)
    attention = case.kernel(
        "attention_pair_bias",
        4 * pairs * c,
        pairs * h * FLOAT32 + 4 * (lay.tile_rows + lay.tile_cols) * c * FLOAT32,
        pairs * h,
        FLOAT32,
        launches=1,
    )
    spans = ("rows", "cols", "cols")
    moved = case.exchange("tokens", spans, [FLOAT32 * c] * 3)
    partial = case.exchange("partials", ("o", "lse"), [FLOAT32 * c, 2 * FLOAT32 * h])
    return bias + linears + attention + moved + partial + transition(case, shard, c, 4, FLOAT32)


def pairformer(case: Case, blocks: int) -> Part:
    """Model a stack of pairformer blocks.

    Args:
        case: the prediction.
        blocks: of the stack.
    """
    return blocks * (pair_block(case, case.dims.token_z) + single_track(case))


def averaging(case: Case, sequences: int) -> Part:
    """Model pair weighted averaging.

    Args:
        case: the prediction.
        sequences: rows of the alignment.
    """
    d, lay, e, pairs = case.dims, case.layout, case.setup.itemsize, case.tile
    width, heads = d.averaging_heads * d.averaging_width, d.averaging_heads
    own = sequences * lay.shard
    weights = case.kernel(
        "pair_weighted_averaging",
        2 * pairs * d.token_z * heads,
        pairs * (d.token_z * case.setup.z_itemsize + 6 * heads * FLOAT32),
        pairs * heads,
        launches=1,
        calls=4,
    )
    each = (2 * lay.tile_cols + 3 * lay.tile_rows) * width * 4
    chunks = ceil(sequences * each / case.setup.chunk_bytes)
    chunks = min(chunks, sequences, 8) if case.setup.size > 1 else min(chunks, sequences)
    moved = own * (4 * d.msa_s + 3 * width) * e
    moved += sequences * (lay.tile_rows + lay.tile_cols) * width * e + chunks * pairs * heads * e
    flops = own * 6 * d.msa_s * width + 2 * sequences * pairs * width
    sums = case.kernel(
        "pair_weighted_averaging", flops, moved, own * width, launches=2 * chunks, calls=6 * chunks
    )
    values = [sequences * width * e / chunks]
    there = case.exchange("tokens", ("cols",), values)
    back = case.exchange("partials", ("o",), values)
    statistics = case.exchange("row", ("weights",), [2 * heads * FLOAT32])
    return weights + sums + chunks * (there + back) + statistics


def outer_product(case: Case, sequences: int) -> Part:
    """Model the outer product mean.

    Args:
        case: the prediction.
        sequences: rows of the alignment.
    """
    d, lay, e, pairs = case.dims, case.layout, case.setup.itemsize, case.tile
    own, square = sequences * lay.shard, d.outer_width**2
    ends = case.kernel(
        "linear", 4 * own * d.msa_s * d.outer_width, own * (6 * d.msa_s) * e, 0, e, calls=6
    )
    flops = 2 * pairs * (sequences * square + square * d.token_z)
    counts = 2 * pairs * sequences
    moved = pairs * (2 * d.token_z * case.setup.z_itemsize + 2 * FLOAT32)
    moved += 2 * sequences * (lay.tile_rows + lay.tile_cols) * d.outer_width * e
    product = case.kernel("outer_product_mean", flops, moved, launches=2, calls=2)
    counted = case.kernel("linear", counts, 0, 0, FLOAT32, calls=2)
    each = [sequences * d.outer_width * e] * 2 + [sequences * e] * 2
    return ends + product + counted + case.exchange("tokens", ("rows", "cols") * 2, each)


def alignment(case: Case, blocks: int) -> Part:
    """Model an MSA module.

    Args:
        case: the prediction.
        blocks: of it.
    """
    d, e = case.dims, case.setup.itemsize
    sequences = max(1, min(case.workload.sequences, d.msa_rows))
    own = sequences * case.layout.shard
    embedded = case.kernel("elementwise", 0, 8 * own * d.msa_s * FLOAT32, calls=14)
    added = case.kernel(
        "elementwise", 0, 4 * case.tile * d.token_z * case.setup.z_itemsize, calls=2
    )
    block = (
        averaging(case, sequences)
        + transition(case, own, d.msa_s, d.widening, e)
        + outer_product(case, sequences)
        + pair_block(case, d.token_z)
    )
    return embedded + added + blocks * block


def templates(case: Case) -> Part:
    """Model the template module, a template at a time."""
    d, pairs, c = case.dims, case.tile, case.dims.template_z
    if not (c and case.workload.templates):
        return Part()
    made = case.kernel(
        "pair_rows", 2 * pairs * d.token_z * c, pairs * (2 * d.token_z + 8 * c) * FLOAT32, calls=40
    )
    block = pair_block(case, c)
    out = case.kernel(
        "pair_rows", 2 * pairs * d.token_z * c, pairs * (2 * d.token_z + 2 * c) * FLOAT32, calls=6
    )
    return case.workload.templates * (2 * made + d.template_blocks * block + out)


def recycling(case: Case) -> Part:
    """Model what a pass of the trunk starts from: the pair before it, normed, and its embedding."""
    d, pairs = case.dims, case.tile
    moved = 10 * pairs * d.token_z * case.setup.z_itemsize
    return case.kernel("pair_rows", 2 * pairs * d.token_z**2, moved, launches=1, calls=20)
