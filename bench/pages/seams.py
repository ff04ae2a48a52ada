"""Blocks generated from the table of seams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from bench.pages.results import markdown
from foldcp.boltz.seams import check, table
from foldcp.boltz.seams.table import Seam


def _seams(rows: Sequence[Seam]) -> str:
    body = [
        (", ".join(f"`{name}`" for name in seam.names), seam.how, f"`foldcp/{seam.ours}`", seam.why)
        for seam in rows
    ]
    return markdown(("name", "foldcp", "in", "why or what"), body)


def _models() -> str:
    body = [
        (f"`foldcp/{seam.ours}`", seam.why, ", ".join(f"`{name}`" for name in seam.bodies))
        for seam in table.MODELS
    ]
    return markdown(("in", "what", "stock's code, below `boltz`"), body)


def bodies() -> str:
    """List every function of which foldcp knows the body, by file, and in which versions."""
    rows = table.bodies()
    count = sum(map(len, rows.values()))
    body = [(f"`boltz/{path}`", ", ".join(f"`{n}`" for n in names)) for path, names in rows.items()]
    versions = ", ".join(check.versions())
    text = f"{count} bodies in {len(rows)} files. All of them are known of Boltz {versions}."
    return f"{text}\n\n{markdown(('file', 'functions, classes and methods'), body)}"


BLOCKS: dict[str, Callable[[], str]] = {
    "seams-command": partial(_seams, table.COMMAND),
    "seams-elsewhere": partial(_seams, table.ELSEWHERE),
    "seams-features": partial(_seams, table.FEATURES),
    "seams-models": _models,
    "seams-bodies": bodies,
}
