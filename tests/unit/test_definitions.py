"""The float64 definition of an op is a statement of its own: it imports nothing of the product."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2] / "foldcp_kernels"
ALLOWED = {"__future__", "dataclasses", "math", "torch"}


def imported(text: str) -> set[str]:
    """First names of what a file imports, inside functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return {name.partition(".")[0] for name in found}


def test_definitions_import_nothing_of_the_product() -> None:
    ops = [x for x in ROOT.iterdir() if x.is_dir() and x.name not in ("core", "__pycache__")]
    assert len(ops) == 11
    for folder in ops:
        path = folder / "definition.py"
        assert not imported(path.read_text()) - ALLOWED, path


def test_an_import_of_the_product_is_seen() -> None:
    assert imported("def f():\n    from . import positions\n") == {""}
    assert imported("import torch.nn, foldcp_kernels.core as c\n") == {"torch", "foldcp_kernels"}
