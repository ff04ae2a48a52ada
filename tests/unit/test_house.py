"""Folders, files and functions stay small enough to be read, and docstrings parse."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import docstrings

ROOT = Path(__file__).parents[2]
ROOMS = [ROOT / name for name in ("foldcp", "foldcp_kernels", "csrc")]
ENTRIES, LINES, FUNCTION, KERNEL = 12, 300, 60, 150
LONG = {"foldcp_kernels/attention/fused.py"}  # one kernel with its launcher


def entries(folder: Path) -> list[str]:
    """List what a folder holds; names with a first underscore are the package's, or built."""
    return sorted(x.name for x in folder.iterdir() if not x.name.startswith("_"))


def functions(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield name, lines, and the bound of each function of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            kernel = any("triton.jit" in ast.unparse(x) for x in node.decorator_list)
            yield node.name, node.end_lineno - node.lineno + 1, KERNEL if kernel else FUNCTION


def test_folders_hold_few_entries() -> None:
    folders = [x for top in ROOMS for x in (top, *top.rglob("*/")) if x.is_dir()]
    folders = [x for x in folders if "__pycache__" not in x.parts]
    assert len(folders) > 30
    full = {x.relative_to(ROOT): len(entries(x)) for x in folders if len(entries(x)) > ENTRIES}
    assert not full, f"more than {ENTRIES} entries: {full}"


def test_files_and_functions_are_short() -> None:
    files = [f for top in ROOMS for s in ("py", "h", "cpp", "cu", "c") for f in top.rglob(f"*.{s}")]
    assert len(files) > 200
    long = {}
    for path in files:
        name, lines = str(path.relative_to(ROOT)), len(path.read_text().splitlines())
        if lines > LINES and name not in LONG:
            long[name] = lines
        if path.suffix == ".py":
            long |= {f"{name}: {f}": n for f, n, most in functions(path) if n > most}
    assert not long, f"files of more than {LINES} lines, functions of more than {FUNCTION}: {long}"


def test_a_docstring_that_a_tool_cannot_read_is_found() -> None:
    path = docstrings.ROOT / "data.py"
    text = (
        '"""What it is."""\ndef f(a, b):\n    """Add.\n\n    Args:\n        a: 1. b: 2.\n    """\n'
    )
    found = list(docstrings.faults(path, text))
    assert [f.partition(": ")[2] for f in found] == [
        "the docstring begins with 'What': begin with a verb",
        "`b` does not have a line of its own",
        "f does not document b",
    ]


def test_no_two_files_of_tests_share_a_name() -> None:
    """pytest imports them by name: of two alike one would not be collected."""
    names = [path.name for path in ROOT.glob("tests/**/test_*.py")]
    assert len(names) > 80
    assert len(names) == len({*names}), sorted(x for x in {*names} if names.count(x) > 1)
