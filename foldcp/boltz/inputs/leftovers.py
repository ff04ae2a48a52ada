"""Find files of earlier runs in a results folder, and decide whether this run can use them."""

from __future__ import annotations

import shutil
import sys
import zipfile
from pathlib import Path

from boltz.data import types

from foldcp.boltz.inputs import trust
from foldcp.errors import UserError


def drop_unfinished(results: Path) -> None:
    """Remove what runs that were killed had not finished; this one has the folder's lock.

    Args:
        results: the results folder, whose own folders lie in it.
    """
    for folder in (results, results / "processed"):
        for path in folder.glob(".partial_*"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def drop_broken_records(folder: Path) -> None:
    """Remove records that cannot be used, such as those of a stock run that was killed."""
    kinds = ("structures", "msa", "constraints", "templates", "mols")
    for path in folder.glob("*.json"):
        try:
            record = types.Record.load(path)
            trust.check_files(record, {kind: folder.parent / kind for kind in kinds})
        except Exception as error:
            if path.is_dir() and not path.is_symlink():
                raise UserError(f"{path} is a folder, not a record: remove it") from error
            print(f"foldcp: {path} is damaged ({error}): its input is read again", file=sys.stderr)
            path.unlink()


def drop_unusable(processed: Path, boltz2: bool) -> None:
    """Remove records whose files are gone or were made for the other model: they are made again.

    Boltz takes a record for the proof that the files are there, and fails on them for ever.

    Args:
        processed: the folder of processed inputs; its records can be loaded.
        boltz2: the model of this run, else Boltz-1.
    """
    for path in sorted((processed / "records").glob("*.json")):
        why = _unusable(types.Record.load(path), processed, boltz2)
        if why:
            print(f"foldcp: {path.stem} is read again: {why}", file=sys.stderr)
            path.unlink()


def _unusable(record: types.Record, processed: Path, boltz2: bool) -> str:
    kinds = ("structures", "msa", "constraints", *(("templates", "mols") if boltz2 else ()))
    for file in trust.files(record, {kind: processed / kind for kind in kinds}):
        if not file.is_file():
            return f"its file {file.parent.name}/{file.name} is gone"
    structure = processed / "structures" / f"{record.id}.npz"
    try:
        with zipfile.ZipFile(structure) as arrays:
            of_boltz2 = "coords.npy" in arrays.namelist()
    except (zipfile.BadZipFile, OSError):
        return f"its file structures/{record.id}.npz is damaged"
    if of_boltz2 != boltz2:
        models = ("Boltz-1", "Boltz-2")
        return f"it was read for {models[of_boltz2]}, and this run is of {models[boltz2]}"
    return ""
