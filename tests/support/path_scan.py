"""Finds each place of a source file that joins a name to a path, opens a file or runs a text."""

from __future__ import annotations

import ast
from pathlib import Path

_PICKLERS = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "yaml")
_TORCH = ("dist", "torch.distributed", "distributed")  # these unpickle what they receive
# Functions by their last name; with texts before the dot, only those.
CALLS: dict[str, tuple[str, ...]] = {
    "open": (), "open_regular": (), "urlretrieve": (), "CDLL": (), "load_library": (),
    "load": ("np", "torch", *_PICKLERS, "super()"), "loads": _PICKLERS, "Unpickler": (),
    "broadcast_object_list": (), "scatter_object_list": (), "recv_object_list": (),
    "all_gather_object": _TORCH, "gather_object": _TORCH, "eval": ("builtins",), "exec": (),
    "memmap": (), "fromfile": (), "loadtxt": (), "genfromtxt": (), "read_csv": (),
    "read_text": (), "read_bytes": (), "write_text": (), "write_bytes": (),
    "save": ("np", "torch"), "savez": (), "savez_compressed": (), "write_file": (),
    "extractall": (), "extract": (), "extractfile": (), "ZipFile": (), "read_structure": (),
    "read": ("cif", "gemmi.cif"), "load_from_checkpoint": (), "import_module": (),
    "joinpath": (), "with_name": (), "with_suffix": (), "with_stem": (),
    "join": ("path", "os.path"), "link": ("os",), "symlink": ("os",), "copy2": (), "copyfile": (),
}  # fmt: skip
# What a division by is a join: the last word of it.
NAMES = {"name", "id", "stem", "record_id", "place", "rank", "path", "kind", "file"}


def places(source: str) -> set[str]:
    """The text of each such expression."""
    return {
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if (isinstance(node, ast.Call) and _opens(node.func) and not _imports(node))
        or (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and _joins(node.right))
    }


def _opens(function: ast.expr) -> bool:
    if isinstance(function, ast.Name):
        return function.id in CALLS and function.id not in ("load", "read", "join", "link")
    if not isinstance(function, ast.Attribute) or function.attr not in CALLS:
        return False
    before = CALLS[function.attr]
    return not before or ast.unparse(function.value) in before


def _imports(call: ast.Call) -> bool:
    """Whether it imports a module that it names itself."""
    last = ast.unparse(call.func).rpartition(".")[2]
    return last == "import_module" and isinstance(call.args[0], ast.Constant)


def _joins(right: ast.expr) -> bool:
    return isinstance(right, ast.JoinedStr) or (
        not isinstance(right, ast.Constant) and ast.unparse(right).rpartition(".")[2] in NAMES
    )


def scan(folder: Path, pattern: str) -> set[tuple[str, str]]:
    """(file, expression) of every place in the files of a folder."""
    return {
        (str(path.relative_to(folder)), found)
        for path in folder.glob(pattern)
        for found in places(path.read_text())
    }
