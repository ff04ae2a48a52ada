"""The options of `boltz predict`, read off Boltz's source: importing Boltz takes ten seconds.

Only the declaration is executed, that is the decorators of the command; click then checks arguments
as it does in Boltz.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import click

_NAMES = ("predict", "get_cache_path")  # the command, and what a default of it calls
_GROUP = "cli"


def command(source: Path) -> click.Command | None:
    """Return the command `predict` without what it does.

    Args:
        source: of `boltz.main`.

    Returns:
        The command; None where its declaration is not understood.
    """
    try:
        tree = ast.parse(source.read_text())
        wanted = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in _NAMES]
        for function in wanted:
            if function.name == "predict":
                function.args = ast.arguments([], [], None, [], [], ast.arg("options"), [])
                function.body = [ast.Pass()]
            function.returns = None
        used = {n.id for function in wanted for n in ast.walk(function) if isinstance(n, ast.Name)}
        module = ast.Module([*_imports(tree, used), *wanted], [])
        known: dict[str, Any] = {"click": click, _GROUP: click.Group(_GROUP)}
        exec(compile(ast.fix_missing_locations(module), str(source), "exec"), known)
    except Exception:  # of another version: Boltz's own command checks the arguments later
        return None
    found = known.get("predict")
    return found if isinstance(found, click.Command) else None


def _imports(tree: ast.Module, used: set[str]) -> list[ast.stmt]:
    """Imports of used names from the standard library, which take no time."""
    found: list[ast.stmt] = []
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            named = [a for a in node.names if (a.asname or a.name) in used]
            origin = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            if named and (origin or "").partition(".")[0] in sys.stdlib_module_names:
                node.names = named
                found.append(node)
    return found


def options(found: click.Command, arguments: list[str]) -> dict[str, Any]:
    """Parse arguments of `boltz predict` into its options.

    Args:
        found: the command.
        arguments: what follows `predict`.

    Returns:
        All options by name, defaults included, as Boltz's `predict` gets them.

    Raises:
        click.ClickException: click refuses them.
    """
    with found.make_context("boltz predict", list(arguments)) as context:
        return dict(context.params)
