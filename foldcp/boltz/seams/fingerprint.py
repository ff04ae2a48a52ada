"""Fingerprint functions and classes by their source, alike under every supported Python.

Bytecode differs between Python 3.10, 3.11 and 3.12, and so does what `ast.dump` prints. Here a
syntax tree is walked and only what changes the meaning is hashed: kinds of nodes and their fields,
names and constants. Left out are places, comments, docstrings, annotations of arguments and
results, click's declarations of options (which are read off the source elsewhere), and fields that
are empty or that only some versions of Python have.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator

Body = ast.stmt

_DEFINED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_LEFT_OUT = {"ctx", "kind", "type_comment", "type_params", "returns", "annotation"}
_DECLARE = {"click", "cli"}  # roots of decorators that declare a command and its options
_DIGITS = 12


def of_file(data: bytes) -> str:
    """Return the fingerprint of a whole file."""
    return hashlib.sha256(data).hexdigest()[:_DIGITS]


def of_bodies(data: bytes) -> dict[str, str]:
    """Return the fingerprint of each function, class, method and constant by qualified name.

    A name that is defined or assigned several times has all of that in its fingerprint.

    Args:
        data: the module's source.

    Raises:
        SyntaxError: it is not the source of a module.
    """
    told: dict[str, list[str]] = {}
    for name, node in _defined(ast.parse(data), ""):
        told.setdefault(name, []).extend(_told(node))
    return {
        name: hashlib.sha256("\n".join(parts).encode()).hexdigest()[:_DIGITS]
        for name, parts in told.items()
    }


def _defined(tree: ast.AST, prefix: str) -> Iterator[tuple[str, Body]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, _DEFINED):
            yield f"{prefix}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from _defined(node, f"{prefix}{node.name}.")
        elif isinstance(node, (ast.If, ast.Try)):
            yield from _defined(node, prefix)
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)) and not prefix:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                # `F.g = h` is a part of F, `d["key"] = 1` of d.
                yield from ((name, node) for name in {ast.unparse(target), _first_name(target)})


def _told(node: ast.AST) -> Iterator[str]:
    """Yield what a tree says, one kind, name or constant at a time."""
    yield type(node).__name__
    for field, value in ast.iter_fields(node):
        # In a class an annotation makes a field; on an argument it changes nothing.
        if field in _LEFT_OUT and not isinstance(node, ast.AnnAssign):
            continue
        parts = value if isinstance(value, list) else [value]
        if field == "body" and isinstance(node, _DEFINED) and ast.get_docstring(node) is not None:
            parts = parts[1:]
        if field == "decorator_list":
            parts = [x for x in parts if _first_name(x) not in _DECLARE]
        if not parts or parts == [None] and not isinstance(node, ast.Constant):
            continue
        yield field
        for part in parts:
            if isinstance(part, ast.AST):
                yield from _told(part)
            else:
                yield repr(part)
    yield "."


def _first_name(node: ast.expr) -> str:
    """Return the first name of a decorator or of what is assigned to."""
    while isinstance(node, (ast.Call, ast.Attribute, ast.Subscript)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""
