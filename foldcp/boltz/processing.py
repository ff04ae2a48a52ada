"""Reading inputs: on the root rank, each whole or not at all, with the reason why one failed.

Stock writes what it makes of an input straight to where later runs look for it. Here it writes to a
folder of its own, from which complete files are moved; the record, which tells later runs that the
input was read, comes last.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from boltz.data import types

from foldcp.boltz import alignments, trust
from foldcp.boltz.run import Run, current
from foldcp.report import UserError
from foldcp.spool import sync, sync_path

# Where stock puts what it makes of an input; the record must be last.
_PLACES = {
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
    "MSA file": "correct its path in the input, which starts from the folder you are in",
}
_LONGEST = 500  # characters of a reason


def install(main: ModuleType) -> None:
    """Switch the reading of inputs over.

    Args:
        main: `boltz.main`.
    """
    main.process_input = whole_or_nothing(main.process_input)
    main.process_inputs = on_root(main.process_inputs)
    main.run_mmseqs2 = kept_answers(main.run_mmseqs2)
    main.parse_a3m = alignments.checked(main.parse_a3m)
    main.parse_csv = alignments.checked(main.parse_csv)
    types.JSONSerializable.dump = dump_json
    trust.install()


def on_root(stock: Callable[..., None]) -> Callable[..., None]:
    """Read the inputs on the root rank and note those that could not be read."""
    stock = getattr(stock, "__wrapped__", stock)

    @wraps(stock)
    def process_inputs(data: list[Path], out_dir: Path, **options: Any) -> None:
        run = current()
        if run is None:
            stock(data=data, out_dir=out_dir, **options)
            return
        if run.session.is_root:
            check_names(data)
            drop_broken_records(out_dir / "processed" / "records")
            with tempfile.TemporaryDirectory(prefix="foldcp_") as folder:
                run.reasons = Path(folder)
                stock(data=data, out_dir=out_dir, **options)
                for path in data:
                    if not (out_dir / "processed" / "records" / f"{path.stem}.json").exists():
                        reason = run.reasons / path.name
                        known = reason.read_text() if reason.exists() else "see above"
                        run.failed[path.name] = known
                run.reasons = None
        run.session.wait_for_root()

    return process_inputs


def check_names(data: Sequence[Path]) -> None:
    """Refuse inputs whose results would have one name, and a folder without inputs.

    Raises:
        UserError: names the files.
    """
    if not data:
        raise UserError("there is no input: give a .yaml or .fasta file, or a folder of them")
    seen: dict[str, Path] = {}
    for path in data:
        other = seen.setdefault(path.stem, path)
        if other is not path:
            raise UserError(
                f"{other.name} and {path.name} would both be called {path.stem}: rename one of them"
            )


def drop_broken_records(folder: Path) -> None:
    """Remove records that cannot be read, such as stock leaves when it is killed."""
    for path in folder.glob("*.json"):
        try:
            types.Record.load(path)
        except Exception as error:
            print(f"foldcp: {path} is damaged ({error}): its input is read again", file=sys.stderr)
            path.unlink()


class _Tee:
    """Standard output that also remembers its last line about a failure."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.failure = ""

    def write(self, text: str) -> int:
        if text.startswith("Failed to process"):
            self.failure = text.partition("Error:")[2].strip() or "see above"
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def whole_or_nothing(stock: Callable[..., None]) -> Callable[..., None]:
    """Read one input, keep all of what that makes or none, and the reason if it fails."""

    @wraps(stock)
    def process_input(path: Path, *args: Any, **options: Any) -> None:
        run = current()
        if run is None or run.reasons is None:
            stock(path, *args, **options)
            return
        records: Path = options["records_dir"]
        partial = records.parent / f".partial_{path.name}"
        try:
            failure = _read(stock, path, args, options, partial)
        except (alignments.Unreadable, OSError) as error:
            failure = str(error)
            print(f"Failed to process {path}. Skipping. Error: {failure}.", flush=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        if failure:
            _keep_reason(run, path, failure)

    return process_input


def _read(
    stock: Callable[..., None],
    path: Path,
    args: tuple[Any, ...],
    options: dict[str, Any],
    partial: Path,
) -> str:
    """Read one input by way of a folder of its own; returns why that failed, or ""."""
    shutil.rmtree(partial, ignore_errors=True)
    places = {option: partial / name for option, name in _PLACES.items()}
    for place in places.values():
        place.mkdir(parents=True)
    alignments.read.clear()
    sys.stdout = tee = _Tee(sys.stdout)
    _answers.append(options["msa_dir"])
    try:
        stock(path, *args, **{**options, **places})
    finally:
        sys.stdout = tee.stream
        _answers.clear()
    if tee.failure:
        return tee.failure
    _check(partial, boltz2=options["boltz2"])
    for option, place in places.items():
        move(place, options[option])
    return ""


def _check(partial: Path, boltz2: bool) -> None:
    for record in map(types.Record.load, (partial / "records").glob("*.json")):
        kind = types.StructureV2 if boltz2 else types.Structure
        structure = kind.load(partial / "structures" / f"{record.id}.npz")
        alignments.check_queries(record, structure, partial / "msa")


def _keep_reason(run: Run, path: Path, failure: str) -> None:
    """Through a file, because this may be a process of Boltz's pool."""
    reason = " ".join(failure.split()).rstrip(".")
    advice = next((text for sign, text in _ADVICE.items() if sign in reason), "")
    assert run.reasons is not None
    kept = f"{reason}: {advice}" if advice else reason
    (run.reasons / path.name).write_text(kept[:_LONGEST])


def move(source: Path, target: Path) -> None:
    """Move what a folder holds to another one, on disk and each file in one step."""
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


_answers: list[Path] = []  # the folder of alignments, while an input is read


def kept_answers(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Ask the MSA server, and keep each complete answer for a later run.

    Stock keeps the folder of a download in which it was interrupted, and fails on it for ever.
    """

    @wraps(stock)
    def run_mmseqs2(x: Any, prefix: Path, *args: Any, **options: Any) -> Any:
        if not _answers:
            return stock(x, prefix, *args, **options)
        folder, prefix = _answers[0], Path(prefix)
        mode = f"pair{options['pairing_strategy']}-env" if options["use_pairing"] else "env"
        known = folder / f"{prefix.name}_{mode}"
        if known.exists():
            try:
                return stock(x, folder / prefix.name, *args, **options)
            except Exception:  # it was kept by stock, or is of other sequences
                shutil.rmtree(known)
        found = stock(x, prefix, *args, **options)
        for path in prefix.parent.glob(f"{prefix.name}_*"):
            path.rename(folder / path.name)
        return found

    return run_mmseqs2
