"""Check docstrings: public functions document each parameter on a line, first lines are sentences.

    python tests/lint/docstrings.py [FOLDER OR FILE ...]

A first line may not begin with a clause ("What the ranks ...") or a word of old books. `Args` must
name every parameter of a public function with two or more, one a line, in no other than its own
words: "See `X`." stands for `Args` where the parameters are those of X. Names that begin with an
underscore, methods of private classes, kernels and functions inside others are not public.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PRODUCT = ("foldcp", "foldcp_kernels", "foldcp_boot.py", "toolchain.py")
BUILT = ("_build_info.py",)  # by setup.py
CLAUSES = (
    "What|How|Of|As|Whether|Where|Why|Who|Whose|Which|When|While|That|If|In|On|By|With|From|Through"
)
ARCHAIC = "told|heard|dear|likewise|leave word|see there|anew|hitherto|thereof|whence"
SECTION = re.compile(r"^(Returns|Raises|Yields|Source|Attributes):", re.MULTILINE)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def public(body: list[ast.stmt]) -> Iterator[Function]:
    """Yield the public functions and methods of a module or class, kernels left out."""
    for node in body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        if isinstance(node, ast.ClassDef):
            yield from public(node.body)
        elif not any("jit" in ast.unparse(d) for d in node.decorator_list):
            yield node


def parameters(node: Function) -> list[str]:
    """Return the names of a function's parameters, without self and those that it ignores."""
    a = node.args
    each = [*a.posonlyargs, *a.args, *filter(None, (a.vararg,)), *a.kwonlyargs]
    each += filter(None, (a.kwarg,))
    return [x.arg for x in each if x.arg not in ("self", "cls", "ctx") and x.arg[0] != "_"]


def documented(doc: str) -> list[str]:
    """Return the names that stand at the start of a line of `Args`."""
    section = SECTION.split(doc.partition("\nArgs:\n")[2])[0]
    return re.findall(r"^    \*{0,2}(\w+): \S", section, re.MULTILINE)


def faults(path: Path, text: str) -> Iterator[str]:
    """Yield what is wrong in the text of a file, each with its line."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if not isinstance(node, Function | ast.ClassDef | ast.Module):
            continue
        at = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"
        doc = ast.get_docstring(node) or ""
        if found := re.match(rf"({CLAUSES})\b", doc):
            yield f"{at}: the docstring begins with {found[0]!r}: begin with a verb"
        if found := re.search(rf"\b({ARCHAIC})\b", doc, re.IGNORECASE):
            yield f"{at}: {found[0]!r} in the docstring: use today's word"
        for name in re.findall(
            r"^    \*{0,2}\w+: [^.\n]*\. ([a-z_]\w*|\w+Error): ", doc, re.MULTILINE
        ):
            yield f"{at}: `{name}` does not have a line of its own"
    for node in public(tree.body):
        at, names = f"{path.relative_to(ROOT)}:{node.lineno}", parameters(node)
        doc = ast.get_docstring(node) or ""
        if not doc:
            yield f"{at}: {node.name} has no docstring"
        elif len(names) > 1 and not re.match(r"See `", doc):
            lacking = [name for name in names if name not in documented(doc)]
            if lacking:
                yield f"{at}: {node.name} does not document {', '.join(lacking)}"


def main() -> None:
    """Check the files and folders of the command line, or the product."""
    paths = [ROOT / name for name in sys.argv[1:] or PRODUCT]
    files = [
        f
        for p in paths
        for f in ([p] if p.suffix else sorted(p.rglob("*.py")))
        if f.name not in BUILT
    ]
    found = [fault for path in files for fault in faults(path, path.read_text())]
    print("\n".join(found), end="\n" if found else "")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
