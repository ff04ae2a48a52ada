"""Put together the page of a report: the run, a table of predictions, and each in detail.

Names and texts come from inputs and files: all of them are escaped, and links are relative paths.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from foldcp import __version__
from foldcp.output.report import charts
from foldcp.output.report.predictions import Prediction, read_best, read_scores
from foldcp.output.report.run import number, section, table
from foldcp.output.report.style import CSS

DETAILED = 20  # predictions that are shown in detail, at most
_ROOM = 4_500_000  # bytes of them, at most
_LISTED = 2000  # predictions in the table, at most
_SCORES = {
    "confidence": "confidence_score", "pTM": "ptm", "ipTM": "iptm", "pLDDT": "complex_plddt",
    "ipLDDT": "complex_iplddt", "PDE, A": "complex_pde", "ligand ipTM": "ligand_iptm",
    "protein ipTM": "protein_iptm",
}  # fmt: skip
_IN_LIST = ("confidence", "pTM", "ipTM", "pLDDT")
_AFFINITY = {
    "affinity, log10 IC50 in uM": "affinity_pred_value",
    "probability of a binder": "affinity_probability_binary",
}


def page(
    title: str,
    folders: Sequence[Path],
    at: Path,
    numbers: Mapping[str, Any] | None = None,
    faults: Sequence[str] = (),
) -> str:
    """Return the page as HTML.

    Args:
        title: of the page.
        folders: of the predictions, named after their inputs, those shown in detail first.
        at: folder that the page will lie in; its links start there.
        numbers: of `foldcp_report.json`, if there is one.
        faults: further files that cannot be read.
    """
    details, room = [], _ROOM
    for folder in folders[:DETAILED]:
        text = _detail(read_best(folder), at)
        if len(text) > room:
            break
        room -= len(text)
        details.append(text)
    rest = len(folders) - len(details)
    note = (
        f'<p class="note">{rest} more without pictures: '
        "<code>foldcp report DIR --only NAME</code> shows those that it names.</p>"
    )
    parts = [
        section(numbers) if numbers else "",
        *(f'<p class="bad">{escape(fault)}</p>' for fault in faults),
        f"<h2>Predictions</h2>{_list(folders)}{note if rest else ''}" if folders else "",
        *details,
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><h1>{escape(title)}</h1>"
        f'<p class="soft">made by foldcp {escape(__version__)}</p>{"".join(parts)}</body></html>\n'
    )


def _list(folders: Sequence[Path]) -> str:
    """Tabulate the best sample of each prediction."""
    rows = []
    for folder in folders[:_LISTED]:
        found = read_scores(folder)
        best = found.scores.get(0, {})
        name = escape(found.name)
        scores = (number(best.get(_SCORES[label]), ".3f") for label in _IN_LIST)
        rows.append((name, *scores, str(len(found.scores)) if found.scores else "-"))
    left = len(folders) - len(rows)
    more = f'<p class="note">and {left:,} more</p>' if left else ""
    return table(("input", *_IN_LIST, "samples"), rows) + more


def _detail(found: Prediction, at: Path) -> str:
    faults = "".join(f'<p class="bad">{escape(fault)}</p>' for fault in found.faults)
    names = [chain.name for chain in found.chains]
    sides = [_samples(found), _chains(found)]
    pictures = [
        "" if found.pae is None else charts.pae(found.pae, found.tokens, found.chains),
        "" if found.iptm is None else f"<div>{charts.iptm(found.iptm, names)}</div>",
    ]
    curve = "" if found.plddt is None else charts.plddt(found.plddt, found.chains)
    return (
        f"<h3>{escape(found.name)}</h3>{faults}{_affinity(found)}"
        f'<div class="sides">{"".join(sides)}</div>{curve}'
        f'<div class="sides">{"".join(pictures)}</div>{_files(found, at)}'
    )


def _samples(found: Prediction) -> str:
    labels = [k for k, key in _SCORES.items() if any(key in s for s in found.scores.values())]
    rows = [
        (str(rank), *(number(scores.get(_SCORES[label]), ".3f") for label in labels))
        for rank, scores in found.scores.items()
    ]
    return f"<div><h4>Samples</h4>{table(('rank', *labels), rows)}</div>" if labels else ""


def _chains(found: Prediction) -> str:
    rows, start = [], 0
    for chain in found.chains:
        own = None if found.plddt is None else found.plddt[start : start + chain.tokens]
        mean = "-" if own is None or not len(own) else number(float(own.mean()) * 100, ".1f")
        rows.append((escape(chain.name), chain.kind, f"{chain.tokens:,}", mean))
        start += chain.tokens
    head = ("chain", "kind", "tokens", "mean pLDDT")
    return f"<div><h4>Chains</h4>{table(head, rows, (1,))}</div>" if rows else ""


def _affinity(found: Prediction) -> str:
    there = {k: found.affinity[key] for k, key in _AFFINITY.items() if key in found.affinity}
    cells = "".join(
        f"<div><dt>{label}</dt><dd>{number(value, '.3f')}</dd></div>"
        for label, value in there.items()
    )
    return f'<dl class="facts">{cells}</dl>' if cells else ""


def _files(found: Prediction, at: Path) -> str:
    items = "".join(
        f'<li><a download href="{escape(_link(path, at))}">{escape(path.name)}</a></li>'
        for path in found.files
    )
    return f'<h4>Files</h4><ul class="files">{items}</ul>'


def _link(path: Path, at: Path) -> str:
    """Return the relative address of a file, in which nothing can be taken for a scheme."""
    return quote(os.fsencode(os.path.relpath(path, at)), safe="/")
