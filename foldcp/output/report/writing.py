"""Write the report of a run beside its predictions, or the page of any results folder."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from foldcp.errors import UserError
from foldcp.output import results
from foldcp.output.report.page import page
from foldcp.output.report.predictions import read_json

NUMBERS, PAGE = "foldcp_report.json", "foldcp_report.html"


def write_numbers(numbers: Mapping[str, Any], path: Path) -> None:
    """Write what was measured of a run.

    Args:
        numbers: see `foldcp.runtime.report.costs`, and what the run adds.
        path: of the file.

    Raises:
        OSError: it cannot be written.
    """
    _put(path, json.dumps(numbers))


def write_page(folder: Path, numbers: Mapping[str, Any], first: Collection[str]) -> None:
    """Write the page of a run.

    Args:
        folder: of the results.
        numbers: of the run.
        first: names of the inputs that it has folded, which are shown first.

    Raises:
        OSError: it cannot be written.
    """
    there = {}
    with suppress(UserError):  # a run of which every input failed
        there = results.find(folder)
    ordered = sorted(there.values(), key=lambda path: path.name not in first)
    _put(folder / PAGE, page(folder.name, ordered, folder, numbers))


def report(asked: Path, only: Sequence[str] = (), out: Path | None = None) -> Path:
    """Write the page of a results folder, of foldcp's or of stock Boltz's.

    Args:
        asked: the folder, one that holds it, or the folder of one prediction.
        only: names of inputs; none: all.
        out: the page; None: in the results folder.

    Returns:
        Where the page is.

    Raises:
        UserError: there is nothing to report on, or the page cannot be written.
    """
    try:
        if asked.is_dir():
            os.listdir(asked)  # `find` takes a folder that it may not read for an empty one
        found = results.find(asked)
    except OSError as error:
        raise UserError(
            f"{asked} cannot be read ({error.strerror}): change its permissions, or name another "
            "results folder"
        ) from error
    if "" in found:
        raise UserError(f"{asked} is a structure: name the folder boltz_results_... that holds it")
    if missing := [name for name in only if name not in found]:
        listed = ", ".join(list(found)[:10])
        raise UserError(
            f"{asked} holds no prediction {missing[0]!r}: name one of those that it holds ({listed}"
            f"{', ...' if len(found) > 10 else ''})"
        )
    folders = [found[name] for name in only or found]
    top = folders[0].parent.parent if folders[0].parent.name == "predictions" else folders[0]
    numbers, faults = None, []
    if (top / NUMBERS).exists():
        try:
            numbers = read_json(top / NUMBERS)
        except (OSError, ValueError, RecursionError) as error:
            faults.append(f"{NUMBERS} cannot be read ({error})")
    target = top / PAGE if out is None else out
    try:
        at = Path(os.path.abspath(target)).parent
        _put(target, page(top.resolve().name, folders, at, numbers, faults))
    except OSError as error:
        raise UserError(
            f"{error.filename or target} cannot be used ({error.strerror}): change its "
            "permissions, or name another page with --out"
        ) from error
    return target


def _put(path: Path, text: str) -> None:
    """Write a text file that is there as a whole or not at all, and never through a link."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    number = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
