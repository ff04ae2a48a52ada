"""Blocks generated from code: the variables of foldcp/config and the ladder of folders."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from bench.machine import ROOT
from foldcp import config
from foldcp.config import Config
from foldcp.config.precision import PRESETS

# The two variables that `Config` does not hold: a secret must not be printed with it, and setup.py
# runs before foldcp is installed.
_APART = {
    "FOLDCP_SECRET": ("text of at least 16 characters", "none", (
        "Seal the messages between ranks. Set the same value on all of them, for example "
        "`openssl rand -hex 16`. `foldcp predict` and `FOLDCP_NPROC` make their own."
    )),
    "FOLDCP_BUILD_CUDA": ("`0`, `1`", "build what compiles", (
        "Read at installation only. `1`: fail unless the CUDA part compiles. `0`: leave it out."
    )),
}  # fmt: skip


def variables() -> str:
    """Tabulate every FOLDCP_* variable: values and defaults as `Config.from_env` reads them."""
    lines = ["| variable | values | default | meaning |", "|---|---|---|---|"]
    meanings, values = _meanings(), _values()
    rows = {}
    for field in fields(Config):
        name, meaning = meanings[field.name]
        rows[name] = (values[field.name], _default(field.default, values[field.name]), meaning)
    rows |= _APART
    for name in config.VARIABLES:
        lines.append(f"| `{name}` | " + " | ".join(rows[name]) + " |")
    return "\n".join(lines)


def _default(default: Any, values: str) -> str:
    if default in (None, ""):
        return "unset"
    return f"`{int(default) if values == '`0`, `1`' else default}`"


def _meanings() -> dict[str, tuple[str, str]]:
    """Read variable and meaning of each field from the docstring of `Config`."""
    text = inspect.cleandoc(Config.__doc__ or "").partition("Args:\n")[2]
    found = {}
    for entry in re.split(r"\n(?=    \w+:)", text.rstrip()):
        words = " ".join(entry.split())
        field, variable, meaning = re.fullmatch(r"(\w+): (FOLDCP\w*)\. (.*)", words).groups()
        found[field] = variable, meaning.replace('"', "`")
    return found


def _values() -> dict[str, str]:
    """Read the allowed values of each field from the calls in `Config.from_env`."""
    tree = ast.parse(inspect.cleandoc(inspect.getsource(Config.from_env.__func__)))
    (call,) = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and _name(n) == "cls")
    return {keyword.arg: _allowed(keyword.value) for keyword in call.keywords}


def _allowed(value: ast.expr) -> str:
    calls = [n for n in ast.walk(value) if isinstance(n, ast.Call)]
    for call in calls:
        if _name(call) == "choice":
            allowed = eval(ast.unparse(call.args[1]), vars(config))
            return ", ".join(f"`{a}`" for a in allowed)
        if _name(call) == "count":
            return "`auto` or a number" if "auto or " in ast.unparse(call) else "a number"
        if _name(call) == "switch_or_path":
            return "`0`, `1` or a path"
        if _name(call) == "precision":
            presets = ", ".join(f"`{name}`" for name in ("auto", *PRESETS))
            return f"{presets}, and changes of groups"
        if _name(call) == "mesh":
            return "`auto` or `RxQ`"
    return "a path"


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id


def ladder() -> str:
    """Draw the folders as tests/unit/test_imports.py orders them, the highest first."""
    (path,) = (ROOT / "tests").rglob("test_imports.py")
    (rows,) = (
        ast.literal_eval(node.value)
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LADDER"
    )
    lines = ["| level | folder | job |", "|---|---|---|"]
    for level in range(len(rows) - 1, -1, -1):
        for name in rows[level]:
            found = f"{name}/" if name == "foldcp_kernels" else f"foldcp/{name}"
            place = ROOT / found
            is_folder = place.is_dir()
            file = place / "__init__.py" if is_folder else place.with_suffix(".py")
            job = ast.get_docstring(ast.parse(file.read_text())).split("\n\n")[0]
            shown = f"{found.rstrip('/')}/" if is_folder else f"{found}.py"
            lines.append(f"| {level} | `{shown}` | {' '.join(job.split())} |")
    return "\n".join(lines)


BLOCKS: dict[str, Callable[[], str]] = {"variables": variables, "ladder": ladder}
