"""Folders are the architecture: imports go one way between them, and no file is in a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Lowest first; what stands in one row does not import each other.
LADDER = (
    ("config",),
    ("errors",),
    ("foldcp_kernels",),
    ("layout",),
    ("fabric",),
    ("planner",),
    ("rings", "runtime"),
    ("modules",),
    ("output", "compat"),
    ("boltz",),
    ("cli",),
    ("__main__",),
)
LEVELS = {room: level for level, row in enumerate(LADDER) for room in row}


def sources(root: Path) -> dict[str, Path]:
    """Name of every module of the product and its file."""
    found = [*root.glob("foldcp/**/*.py"), *root.glob("foldcp_kernels/**/*.py")]
    return {
        ".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): p
        for p in found
    }


def imports(path: Path, modules: dict[str, Path]) -> set[str]:
    """Modules that a file imports, inside functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{a.name}": node.module for a in node.names}
            found |= {name if name in modules else module for name, module in names.items()}
    return found


def room(module: str) -> str:
    """Folder of a module, "" for the package itself (version and public names)."""
    top, _, rest = module.partition(".")
    found = top if top != "foldcp" else rest.partition(".")[0]
    return "" if found == "_version" else found


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Imports that go up the ladder, or between two rooms of one row."""
    wrong = []
    for module, found in graph.items():
        here = room(module)
        for name in found:
            there = room(name)
            known = name.partition(".")[0] in ("foldcp", "foldcp_kernels")
            if here and there and known and here != there and LEVELS[there] >= LEVELS[here]:
                wrong.append(f"{module} imports {name}")
            if name.partition(".")[0] == "boltz" and here != "boltz":
                wrong.append(f"{module} imports {name}: only foldcp.boltz may")
    return wrong


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Sets of modules that import each other, directly or through others."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            new = graph.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        return seen

    far = {module: reach(module) for module in graph}
    found = {frozenset(m for m in far[n] if n in far.get(m, ())) for n in graph if n in far[n]}
    return [", ".join(sorted(circle)) for circle in found]


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    modules = sources(ROOT)
    assert len(modules) > 150
    return {name: imports(path, modules) - {name} for name, path in modules.items()}


def test_imports_go_one_way(graph: dict[str, set[str]]) -> None:
    assert {room(m) for m in graph} - {""} == set(LEVELS)
    assert not upward(graph)


def test_no_file_is_in_a_circle(graph: dict[str, set[str]]) -> None:
    assert not circles(graph)


def test_checks_see_what_is_wrong(tmp_path: Path) -> None:
    """An import for type checkers, and one inside a function, are imports too."""
    files = {
        "foldcp/layout/a.py": "def f():\n    from foldcp.layout import b\n",
        "foldcp/layout/b.py": "if TYPE_CHECKING:\n    from foldcp.layout.a import f\n",
        "foldcp/fabric/c.py": "import foldcp.boltz.switch\nfrom boltz.main import cli\n",
        "foldcp/boltz/switch.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    modules = sources(tmp_path)
    graph = {name: imports(path, modules) for name, path in modules.items()}
    assert circles(graph) == ["foldcp.layout.a, foldcp.layout.b"]
    assert [x.split(" imports ")[0] for x in upward(graph)] == ["foldcp.fabric.c"] * 2


@pytest.mark.process
def test_importing_needs_neither_boltz_nor_triton() -> None:
    code = (
        "import sys\n"
        "for name in ('boltz', 'triton', 'pytorch_lightning'): sys.modules[name] = None\n"
        "import foldcp, foldcp.fabric.exchange.autograd, foldcp_kernels.core.definitions\n"
        "import foldcp.modules.trunk.pairformer\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
