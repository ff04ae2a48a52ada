"""Read one input whole or not at all, with the reason if that fails.

Stock writes what it makes of an input straight to where later runs look for it. Here it writes to a
folder of its own, from which complete files are moved; the record, from which later runs see that
the input was read, comes last.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from types import FunctionType
from typing import Any

from boltz.data import types

from foldcp.boltz.document import schema
from foldcp.boltz.document.explain import explain
from foldcp.boltz.document.faults import at, visible
from foldcp.boltz.document.setting import Setting
from foldcp.boltz.inputs import msas, queries
from foldcp.boltz.inputs.alignments import Alignments
from foldcp.boltz.run import Run, current
from foldcp.boltz.seams.rebind import rebind
from foldcp.output.spool import sync, sync_path
from foldcp.runtime.files.seal import Lost

# Where stock puts what it makes of an input; the record must be last.
PLACES = {
    "msa_dir": "server",
    "processed_msa_dir": "msa",
    "processed_constraints_dir": "constraints",
    "processed_templates_dir": "templates",
    "processed_mols_dir": "mols",
    "structure_dir": "structures",
    "records_dir": "records",
}
_ADVICE = {
    "[Errno 28]": "free the disk or pass another --out_dir",
    "[Errno 27]": "free the disk or pass another --out_dir",
    "[Errno 122]": "free the disk or pass another --out_dir",
    "[Errno 13]": "change the permissions, or the path in the input",
}
_LONGEST = 500  # characters of a reason


def whole_or_nothing(stock: FunctionType) -> Callable[..., None]:
    """Read one input, keep all of what that makes or none, and the reason if it fails."""

    @wraps(stock)
    def process_input(path: Path, *args: Any, **options: Any) -> None:
        run = current()
        if run is None or run.reasons is None:
            stock(path, *args, **options)
            return
        partial = _partial(path, options)
        try:
            failure = _wrong(path, options, run) or _read(stock, path, args, options, run)
        except (msas.Unreadable, OSError, Lost) as error:
            failure = str(error)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        if failure:
            failure, name = visible(" ".join(failure.split())), visible(path.name)
            print(f"foldcp: {name} is left out: {failure}", flush=True)
            _keep_reason(run, path, failure)

    return process_input


def _partial(path: Path, options: dict[str, Any]) -> Path:
    """Return the folder in which an input is read."""
    records: Path = options["records_dir"]
    return records.parent / f".partial_{path.name}"


def _wrong(path: Path, options: dict[str, Any], run: Run) -> str:
    """Check what the user wrote, before Boltz's parser; returns what is wrong, or ""."""
    molecules, folder = options["ccd"], Path(options["mol_dir"])

    def has_residue(code: str) -> bool:
        return code in molecules or ("/" not in code and (folder / f"{code}.pkl").exists())

    server, form = bool(options["use_msa_server"]), run.output_format
    faults = schema.check(path, Setting(options["boltz2"], server, form, has_residue))
    for line, text in [] if faults.found else faults.notes:
        print(f"foldcp: {path.name}: {at(line, text)}", file=sys.stderr)
    return faults.message()


def _read(
    stock: FunctionType,
    path: Path,
    args: tuple[Any, ...],
    options: dict[str, Any],
    run: Run,
) -> str:
    """Read one input by way of a folder of its own; returns why that failed, or ""."""
    partial = _partial(path, options)
    shutil.rmtree(partial, ignore_errors=True)
    places = {option: partial / name for option, name in PLACES.items()}
    for place in places.values():
        place.mkdir(parents=True)
    run.alignments = Alignments(partial / "alignments", options["msa_dir"])
    try:
        rebind(stock, print=_raise_again)(path, *args, **{**options, **places})
    except Exception as error:
        return explain(error)
    _check(partial, options["boltz2"], run.alignments)
    if run.seal is not None:
        run.seal.check()
    for option, place in places.items():
        move(place, options[option])
    return ""


def _raise_again(*_: object) -> None:
    """Raise what stock has caught: it prints nothing but that, after the traceback."""
    raise  # noqa: PLE0704


def _check(partial: Path, boltz2: bool, alignments: Alignments) -> None:
    for record in map(types.Record.load, (partial / "records").glob("*.json")):
        kind = types.StructureV2 if boltz2 else types.Structure
        structure = kind.load(partial / "structures" / f"{record.id}.npz")
        queries.check(record, structure, partial / "msa", alignments)


def _keep_reason(run: Run, path: Path, failure: str) -> None:
    """Leave the reason in a file, because this may be a process of Boltz's pool."""
    reason = " ".join(failure.split()).rstrip(".")
    advice = next((text for sign, text in _ADVICE.items() if sign in reason), "")
    assert run.reasons is not None
    kept = f"{reason}: {advice}" if advice else reason
    with suppress(OSError):  # that folder is full, too: it stands above
        (run.reasons / path.name).write_text(kept[:_LONGEST])


def move(source: Path, target: Path) -> None:
    """Move what a folder holds to another one, on disk and each file in one step.

    Args:
        source: folder that is emptied.
        target: folder that receives its entries.
    """
    entries = sorted(source.iterdir())
    for entry in entries:
        if entry.is_file():
            sync_path(entry)
        elif (target / entry.name).exists():
            shutil.rmtree(target / entry.name)
        os.replace(entry, target / entry.name)
    if entries:
        sync_path(target)


def dump_json(self: Any, path: Path) -> None:
    """Write a record or manifest to its file, whole or not at all."""
    partial = path.with_name(f".partial_{path.name}")
    with partial.open("w") as file:
        json.dump(self.to_dict(), file)
        sync(file)
    os.replace(partial, path)
    sync_path(path.parent)
