"""Cut the work of each strategy: groups and pieces of channels, chunks of lines. Integers only."""

from __future__ import annotations

from foldcp.layout.tiles import PairLayout, Span

# Triangle multiplication keeps the planes of a quarter of the channels at a time, to make room for
# panels, in lean memory of an eighth on several ranks, where two groups exist at a time; a group is
# cut in as many pieces at most.
GROUPS, LEAN_GROUPS, PIECES = 4, 8, 8
# Below this part of a chunk's bytes panels are not cut: latency and launches would cost more than
# the memory is worth.
_PIECES_OF_CHUNK = 8
_MOST_PRODUCTS = 4  # of a panel
# Chunks of channels and of lines, at most. Each chunk of lines fetches its part of the bias again,
# of `rows` the whole bias, H N^2 elements: P / 32 tiles at 4 heads and 128 channels.
_MOST_CHUNKS, _MOST_LINE_CHUNKS = 16, 8
# In lean memory: chunks at most, and what an op may hold beside z, in tiles of what it computes in.
# 1.65 tiles of bfloat16 are 422 bytes of a pair, beside its 512 of z.
_MOST_LEAN, LEAN_TILES = 64, 1.65
# What a chunk of lines, of panels or of channels holds, in parts of a tile as large as the chunk
# (`bench.mesh_memory` counts it): at most, while chunks before and after it travel.
_LINES_HELD, _PANELS_HELD, _CHUNKS_HELD = 12.5, 15.5, 9.5


def chunks(length: int, count: int) -> tuple[Span, ...]:
    """Cut `length` in at most `count` spans of (nearly) equal size; at least one span.

    Args:
        length: to cut.
        count: of spans, at most.
    """
    width = max(1, -(-length // max(1, count)))
    return tuple((i, min(i + width, length)) for i in range(0, max(length, 1), width))


def channel_groups(
    layout: PairLayout, channels: int, itemsize: int, chunk_bytes: int, lean: bool = False
) -> tuple[Span, ...]:
    """Cut channels in the groups whose planes exist at the same time.

    Args:
        layout: the tiling.
        channels: D.
        itemsize: bytes of an element of a plane.
        chunk_bytes: largest temporary of a chunk.
        lean: in lean memory, where one rank cuts them as well.
    """
    planes = channels * itemsize * layout.tile_rows * layout.tile_cols
    many = layout.size > 1 or lean
    if not many or planes < GROUPS * (chunk_bytes // _PIECES_OF_CHUNK):
        return chunks(channels, 1)
    return chunks(channels, LEAN_GROUPS if lean and layout.size > 1 else GROUPS)


def channel_pieces(layout: PairLayout, channels: int, itemsize: int, chunk_bytes: int) -> int:
    """Return the channel chunks of one group's exchange: panels stay small beside the tile.

    Args:
        layout: the tiling.
        channels: of the group.
        itemsize: bytes of an element of a plane.
        chunk_bytes: largest temporary of a chunk.
    """
    if layout.size == 1:
        return 1
    plane = itemsize * layout.tile_rows * layout.tile_cols
    panel = channels * plane * max(layout.mesh_rows, layout.mesh_cols) // layout.panels
    return max(1, min(channels, PIECES, panel // max(1, chunk_bytes // _PIECES_OF_CHUNK)))


def channel_widths(layout: PairLayout, channels: int, count: int) -> tuple[int, ...]:
    """Return the channels of each chunk of the strategy "channel".

    A chunk has a multiple of P channels; the last may have fewer.

    Args:
        layout: the tiling.
        channels: D.
        count: chunks, at most.
    """
    width = layout.size * -(-channels // (layout.size * count))
    return tuple(min(width, channels - lo) for lo in range(0, channels, width))


def share_of_channels(channels: int, size: int, rank: int) -> Span:
    """Return a rank's share of the channels (none where there are more ranks).

    Args:
        channels: of a chunk.
        size: number of ranks.
        rank: whose share.
    """
    return channels * rank // size, channels * (rank + 1) // size


def strips_of_lines(layout: PairLayout, outgoing: bool) -> int:
    """Return the number of strips of lines in which triangle multiplication's planes are written.

    As many as other ranks want them in, so that what travels of a strip is one run of memory; 1
    where wants are not by strips, see `products_of_panel`.

    Args:
        layout: the tiling.
        outgoing: which of the two updates.
    """
    return layout.panels_of(not outgoing) if by_strips(layout) else 1


def products_of_panel(layout: PairLayout) -> int:
    """Count the products of one panel of triangle multiplication, by strips of rows and columns.

    One where neither side of the mesh divides the other, so that a want is a part of several
    strips, or one side is so much longer that products would be small and many.
    """
    return layout.panels**2 // layout.size if by_strips(layout) else 1


def by_strips(layout: PairLayout) -> bool:
    """Return True where panels of triangle multiplication are wanted by strips."""
    divides = layout.panels == max(layout.mesh_rows, layout.mesh_cols)
    return divides and layout.panels**2 // layout.size <= _MOST_PRODUCTS


def line_chunks(layout: PairLayout, starting: bool, count: int) -> tuple[Span, ...]:
    """Cut the lines of a tile in at most `count` chunks that the ranks of their group share evenly.

    The group of a tile's rows are the ranks of its mesh row, that of its columns those of its mesh
    column. There are as many shards of lines in a tile as ranks in the group, so that every chunk
    has the same number of lines, at least one, for each of them.

    Args:
        layout: the tiling.
        starting: the lines are rows; else columns.
        count: of chunks, at most.
    """
    group = layout.mesh_cols if starting else layout.mesh_rows
    return tuple((lo * group, hi * group) for lo, hi in chunks(layout.shard, count))


def chunk_counts(
    name: str, layout: PairLayout, z_bytes: int, op_bytes: int, chunk_bytes: int, lean: bool = False
) -> tuple[int, int]:
    """Return the fewest and the most chunks of lines or channels that a strategy takes.

    The fewest keep what a chunk takes within a quarter of z, or within three quarters of a chunk's
    bytes where that is more. In lean memory they keep all that an op holds within `LEAN_TILES`,
    or within those bytes, where a strategy can.

    Args:
        name: of the strategy.
        layout: the tiling.
        z_bytes: of this rank's tile of z.
        op_bytes: of the tile in what the op computes in.
        chunk_bytes: largest temporary of a chunk.
        lean: in lean memory.
    """
    if lean:
        enough = (
            n for n in range(1, _MOST_LEAN) if is_lean(name, layout, n, op_bytes, chunk_bytes)
        )
        return next(enough, _MOST_LEAN), _MOST_LEAN
    most = _MOST_CHUNKS if name == "channel" else _MOST_LINE_CHUNKS
    if name == "rows":
        most = max(2, min(most, 64 // layout.size))
    # a, b and product, which travel both ways at a time; or q, k, v and o.
    operands = 6 if name == "channel" else 4
    limit = max(3 * chunk_bytes // 4, z_bytes // 4)
    return min(most, -(-operands * op_bytes // max(1, limit))), most


def is_lean(
    name: str,
    layout: PairLayout,
    count: int,
    op_bytes: int,
    chunk_bytes: int,
    heads: float = 4 / 128,
) -> bool:
    """Tell whether a strategy of chunks stays within lean memory, by `tiles_held`.

    Args:
        name: of the strategy.
        layout: the tiling.
        count: chunks.
        op_bytes: of the tile in what the op computes in.
        chunk_bytes: largest temporary of a chunk, which is allowed beside a small tile.
        heads: per channel.
    """
    held = op_bytes * tiles_held(name, layout, count, heads)
    return held <= max(LEAN_TILES * op_bytes, 3 * chunk_bytes // 4)


def tiles_held(name: str, layout: PairLayout, count: int, heads: float = 4 / 128) -> float:
    """Return what a strategy of chunks holds beside z, in tiles of what the op computes in.

    Of a chunk of lines: received and sent panels or lines of this chunk and of its neighbours, its
    queries, keys and values, and results in float32. Of a chunk of channels: planes and products
    of this chunk and its neighbours, the planes of a group, and the product of all channels.

    Args:
        name: of the strategy.
        layout: the tiling.
        count: chunks.
        heads: per channel, of the bias.
    """
    if name == "channel":
        whole = 128  # of any number of channels the parts are about these
        widths = channel_widths(layout, whole, count)
        group = min(whole, widths[0] * -(-len(widths) // LEAN_GROUPS))
        return 1 + (2 * group + _CHUNKS_HELD * widths[0]) / whole
    panel = layout.padded / layout.panels
    if name == "rows":
        share = -(-layout.shard // count) / layout.shard
        bias = layout.padded * panel / (layout.tile_rows * layout.tile_cols)
        return _LINES_HELD * share + heads * (1 + 2 * bias)
    return _PANELS_HELD / count + 4 * heads
