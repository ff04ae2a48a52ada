"""Run a notebook without Jupyter: `notebook.py IN OUT` writes it with what its cells print."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

ALLOWED = {"foldcp", "numpy"}  # beside the standard library


def executed(notebook: dict[str, Any]) -> dict[str, Any]:
    """Run the code cells in order, and keep what each prints as its output.

    Args:
        notebook: the parsed file; changed in place.

    Returns:
        `notebook`.

    Raises:
        SystemExit: the cells imported more than they may.
    """
    known = set(sys.modules)
    names: dict[str, Any] = {"__name__": "__main__"}
    count = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        count += 1
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"cell {count}", "exec"), names)
        text = printed.getvalue().splitlines(keepends=True)
        stream = {"name": "stdout", "output_type": "stream", "text": text}
        cell["execution_count"], cell["outputs"] = count, [stream] if text else []
    # Modules without a file are made by others while they are imported.
    files = {n for n in set(sys.modules) - known if getattr(sys.modules[n], "__file__", None)}
    loaded = {name.partition(".")[0] for name in files}
    if more := loaded - ALLOWED - set(sys.stdlib_module_names):
        sys.exit(f"the notebook imports {', '.join(sorted(more))}")
    return notebook


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    made = executed(json.loads(source.read_text()))
    target.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")
