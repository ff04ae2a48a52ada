"""Draw the tiles of a pair matrix on a mesh, and what one rank fetches for a panel, as SVG."""

from __future__ import annotations

from collections.abc import Iterator

from foldcp.layout.tiles import PairLayout

ROWS, COLS, N, RANK = 2, 3, 600, 3
SIDE, TOP, GAP = 240, 64, 120  # pixels: of the matrix, above it, between two of them
COLOURS = ("#8ecae6", "#ffd166", "#b7e4c7", "#f4a261", "#cdb4db", "#a8dadc")
TEXT = 'font-family="sans-serif" fill="#222"'


def svg() -> str:
    """Draw who holds what on the left and where one rank gets its panels from on the right.

    Returns:
        The picture. Every box is one that `PairLayout` names.
    """
    width, height = 40 + 2 * SIDE + GAP + 80, TOP + SIDE + 44
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="Tiles of a pair matrix on a {ROWS}x{COLS} mesh">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *_tiles(40),
        *_panels(40 + SIDE + GAP),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _layout(rank: int = RANK) -> PairLayout:
    return PairLayout(N, ROWS, COLS, rank)


def _scale(tokens: int) -> float:
    return round(SIDE * tokens / _layout().padded, 1)


def _rect(x: float, box: tuple, fill: str, extra: str = "") -> str:
    (top, bottom), (left, right) = box
    at = f'x="{x + _scale(left)}" y="{TOP + _scale(top)}"'
    size = f'width="{_scale(right - left)}" height="{_scale(bottom - top)}"'
    return f'<rect {at} {size} fill="{fill}" stroke="#444" stroke-width="1"{extra}/>'


def _text(x: float, y: float, words: str, size: int = 13, anchor: str = "middle") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" {TEXT}>{words}</text>'


def _tiles(x: float) -> Iterator[str]:
    yield _text(x, 20, f"z: N = {N} tokens on a {ROWS}x{COLS} mesh", anchor="start")
    yield _text(x, 40, "one tile per rank, N²/P pairs each", 12, "start")
    for rank in range(ROWS * COLS):
        box = _layout(rank).tile_box(rank)
        yield _rect(x, box, COLOURS[rank])
        (top, bottom), (left, right) = box
        middle = x + _scale((left + right) // 2)
        down = TOP + _scale((top + bottom) // 2)
        yield _text(middle, down, f"rank {rank}", 14)
        yield _text(middle, down + 18, f"{bottom - top} x {right - left}", 11)


def _panels(x: float) -> Iterator[str]:
    layout = _layout()
    yield _text(x, 20, f"What rank {RANK} uses, and from whom", anchor="start")
    yield _text(x, 40, "triangle multiplication, outgoing; numbers are steps", 12, "start")
    whole = ((0, layout.padded), (0, layout.padded))
    yield _rect(x, whole, "#f4f4f4")
    rows, cols = layout.tile_box()
    # x[i, j] = sum over k of a[i, k] b[j, k]: i are the rows of the tile, j its columns.
    for name, lines in (("a[i, k]", rows), ("b[j, k]", cols)):
        for step in range(layout.panels):
            panel = layout.panel_span(layout.panel_at(RANK, step))
            yield _rect(x, (lines, panel), COLOURS[_owner((lines, panel))])
            at = TOP + _scale(sum(lines) // 2) + 4
            yield _text(x + _scale(sum(panel) // 2), at, str(step), 12)
        yield _text(x + SIDE + 10, TOP + _scale(sum(lines) // 2) + 4, name, 13, "start")
    yield _rect(x, (rows, cols), "none", ' style="stroke:#c1121f;stroke-width:3"')
    words = f"Colour: owner of the panel. Red: the tile of rank {RANK}."
    yield _text(x, TOP + SIDE + 24, words, 12, "start")


def _owner(box: tuple) -> int:
    """Find the rank whose tile holds a box."""
    for rank in range(ROWS * COLS):
        tile = _layout(rank).tile_box(rank)
        if all(lo <= a and b <= hi for (a, b), (lo, hi) in zip(box, tile, strict=True)):
            return rank
    raise AssertionError(f"{box} is in no tile")
