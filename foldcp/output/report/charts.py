"""Draw pLDDT along the chains, PAE and the ipTM of pairs of chains as parts of a page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foldcp.output.report import png
from foldcp.output.results import Chain

_POINTS = 1000  # of a curve, at most
_FAR = 30.0  # angstrom, the end of the scale of PAE
_NEAR_COLOUR, _FAR_COLOUR, _NO_COLOUR = (0, 78, 40), (255, 255, 255), (150, 150, 150)
_MOST_CHAINS = 40  # in a matrix of pairs
_LEAST_SHARE = 0.03  # of the tokens: shorter chains have no room for a name


def plddt(values: NDArray[Any], chains: Sequence[Chain]) -> str:
    """Draw pLDDT over the tokens, with the chains below.

    Args:
        values: [N], 0 to 1.
        chains: whose tokens add up to N, or none.
    """
    count, width = len(values), -(-len(values) // _POINTS)
    starts = np.arange(0, count, width)
    means = np.add.reduceat(values, starts) / np.diff(np.append(starts, count))
    middles = (starts + np.append(starts[1:], count)) / 2 / count * 1000
    points = " ".join(
        f"{x:.1f},{100 - 100 * min(1.0, max(0.0, y)):.1f}"
        for x, y in zip(middles.tolist(), means.tolist(), strict=True)
        if np.isfinite(y)
    )
    levels = "".join(f'<line class="level" x1="0" x2="1000" y1="{y}" y2="{y}"/>'
                     for y in (10, 30, 50))  # fmt: skip
    ticks = "".join(f'<span style="top:{100 - at}%">{at}</span>' for at in (90, 70, 50))
    note = f" Each point is the mean of {width} tokens." if width > 1 else ""
    return (
        f'<h4>pLDDT along the chains</h4><div class="plot"><div class="ticks">{ticks}</div>'
        f'<svg viewBox="0 0 1000 100" preserveAspectRatio="none" role="img" '
        f'aria-label="pLDDT of {count} tokens">{_bands(chains)}{levels}'
        f'<polyline class="curve" points="{points}"/></svg></div>{_names(chains, "along")}'
        f'<p class="note">{count:,} tokens; lines at 90, 70 and 50.{note}</p>'
    )


def _edges(chains: Sequence[Chain]) -> list[float]:
    """Return where chains begin and end, from 0 to 1000."""
    sums = list(accumulate((chain.tokens for chain in chains), initial=0))
    return [1000 * at / sums[-1] for at in sums] if sums[-1] else []


def _bands(chains: Sequence[Chain]) -> str:
    spans = list(pairwise(_edges(chains)))[1::2]
    return "".join(
        f'<rect class="band" x="{a:.2f}" width="{b - a:.2f}" y="0" height="100"/>' for a, b in spans
    )


def _names(chains: Sequence[Chain], where: str) -> str:
    total = sum(chain.tokens for chain in chains)
    cells = "".join(
        f'<span style="width:{100 * c.tokens / total:.4f}%" title="{escape(c.name)}: '
        f'{c.tokens:,} tokens">{escape(c.name) if c.tokens / total >= _LEAST_SHARE else ""}</span>'
        for c in chains
    )
    return f'<div class="names {where}">{cells}</div>' if cells else ""


def pae(matrix: NDArray[Any], tokens: int, chains: Sequence[Chain]) -> str:
    """Draw the predicted aligned error with the borders of chains.

    Args:
        matrix: [n, n], angstrom, reduced from N x N.
        tokens: N.
        chains: whose tokens add up to N, or none.
    """
    shades = np.linspace(_NEAR_COLOUR, _FAR_COLOUR, 255).round().astype(int)
    palette = [(int(r), int(g), int(b)) for r, g, b in shades] + [_NO_COLOUR]
    known = np.isfinite(matrix)
    scaled = np.clip(np.where(known, matrix, 0) / _FAR, 0, 1) * 254
    pixels = np.where(known, scaled.round(), 255).astype(np.uint8)
    image = base64.b64encode(png.encode(pixels, palette)).decode()
    lines = "".join(
        f'<line class="border" x1="{at:.2f}" x2="{at:.2f}" y1="0" y2="1000"/>'
        f'<line class="border" x1="0" x2="1000" y1="{at:.2f}" y2="{at:.2f}"/>'
        for at in _edges(chains)[1:-1]
    )
    side = -(-tokens // len(matrix))
    note = f" Each pixel is the mean of {side} x {side} tokens." if side > 1 else ""
    return (
        f'<div class="square"><h4>PAE</h4>{_names(chains, "above")}<div class="image">'
        f'<img alt="PAE of {tokens} x {tokens} tokens" src="data:image/png;base64,{image}">'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none">{lines}</svg></div>'
        f'<div class="scale"><span>0</span><i></i><span>{_FAR:.0f} A</span></div>'
        f'<p class="note">Row: aligned on. Column: error of.{note}</p></div>'
    )


def iptm(matrix: NDArray[Any], names: Sequence[str]) -> str:
    """Tabulate the ipTM of pairs of chains.

    Args:
        matrix: [chains, chains], the pTM of a chain on the diagonal.
        names: of the chains; of another number where they are not known.
    """
    if len(matrix) > _MOST_CHAINS:
        return (
            f"<h4>ipTM of pairs of chains</h4><p>{len(matrix)} chains are too many for a table: "
            "the confidence file has the values.</p>"
        )
    if len(names) != len(matrix):
        names = [str(i) for i in range(len(matrix))]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(map(_cell, row.tolist()))}</tr>'
        for name, row in zip(names, matrix, strict=True)
    )
    return (
        '<h4>ipTM of pairs of chains</h4><div class="wide"><table class="pairs">'
        f"<tr><th></th>{head}</tr>{rows}</table></div>"
        '<p class="note">On the diagonal: pTM of the chain.</p>'
    )


def _cell(value: float) -> str:
    if not np.isfinite(value):
        return "<td>-</td>"
    share = min(1.0, max(0.0, value))
    return f'<td style="background:rgba(31,111,178,{0.75 * share:.2f})">{value:.2f}</td>'
