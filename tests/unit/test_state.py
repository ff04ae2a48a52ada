"""State is handed down: what a process keeps in variables of modules is listed here, and why."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import torch

from foldcp.config import Config
from foldcp.fabric.policy import Policy
from foldcp.runtime.place import Place
from foldcp.runtime.session import Session

ROOM = Path(__file__).parents[2] / "foldcp"
CHANGES = {"append", "add", "clear", "update", "pop", "setdefault", "extend", "remove", "set"}
CHANGES |= {"insert", "discard", "popitem", "appendleft", "extendleft", "popleft", "subtract"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
# One reason a file; it says so itself.
KEPT = {
    "boltz/run.py": "stock's functions are called by stock, and find the prediction here",
    "fabric/message.py": "what may travel, and the secret of the process's environment",
    "modules/graphs/lasting.py": "what cuBLAS and torch's allocator keep for the process",
    "runtime/files/lock.py": "locks that a signal must give back",
    "runtime/liveness/guard.py": "a process ends once",
    "runtime/liveness/signals.py": "Python's handlers of signals and forks",
    "runtime/session.py": "one run at a time",
    "runtime/store/meetings.py": "the store that a process serves",
}


def _at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the statements of a module, those in its `if`s and `try`s included."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With | ast.For):
            yield from _at_import(node)


def variables(source: str) -> Iterator[str]:
    """Yield the variables of a module that its functions change.

    Args:
        source: of the module.
    """
    tree = ast.parse(source)
    body = list(_at_import(tree))
    targets = [t for x in body if isinstance(x, ast.Assign) for t in x.targets]
    targets += [x.target for x in body if isinstance(x, ast.AnnAssign)]
    names = {x.id for t in targets for x in ast.walk(t) if isinstance(x, ast.Name)}
    functions = [x for x in ast.walk(tree) if isinstance(x, FUNCTIONS)]
    changed = {name for x in ast.walk(tree) if isinstance(x, ast.Global) for name in x.names}
    for node in (x for f in functions for x in ast.walk(f)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in CHANGES and isinstance(node.func.value, ast.Name):
                changed.add(node.func.value.id)
        elif isinstance(node, ast.Subscript | ast.Attribute) and not isinstance(node.ctx, ast.Load):
            changed |= {node.value.id} if isinstance(node.value, ast.Name) else set()
    yield from sorted(names & changed)


def test_a_variable_that_functions_change_is_found() -> None:
    source = (
        "a: list = []\nb = {}\nc = 0\nd = [1]\ne = {}\ne['x'] = 1\nclass F:\n    def f(self):\n"
        "        global c\n        c = 1\n        a.append(1)\n        b['x'] = d[0]\n"
        "        g.h = 1\ng = F()\n"
    )
    assert list(variables(source)) == ["a", "b", "c", "g"]
    for source in (
        "a = []\ndef f():\n    a.insert(0, 1)\n",
        "a, b = [], []\ndef f():\n    a.append(b)\n",
        "if True:\n    a = []\ndef f():\n    a.append(1)\n",
        "a = set()\nasync def f():\n    a.discard(1)\n",
        "a = {}\nf = lambda: a.popitem()\n",
    ):
        assert list(variables(source)) == ["a"], source


def test_no_other_file_keeps_state_of_the_process() -> None:
    found = {}
    for path in ROOM.rglob("*.py"):
        if names := list(variables(path.read_text())):
            found[str(path.relative_to(ROOM))] = names
    new = {file: names for file, names in found.items() if file not in KEPT}
    assert not new, f"hand it down in an object (of the run, the session, the mesh): {new}"
    assert not set(KEPT) - set(found), f"strike out: {sorted(set(KEPT) - set(found))}"


def test_a_session_hands_the_variables_of_its_run_to_the_mesh() -> None:
    chosen = dict(route="ring", wire="fp8", multiplication="channel", attention="rows", graphs="0")
    session = Session(Place.find({}), meeting_time=1.0, signals=False)
    mesh = session.form(1, 1, torch.device("cpu"), Config(**chosen))
    assert mesh.policy == Policy(**chosen)
