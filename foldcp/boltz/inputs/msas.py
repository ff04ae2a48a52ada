"""Alignments that cannot be read: found while an input is read, and named with what to do.

Stock ends in a traceback without the file's name, or fails when the features are computed.
"""

from __future__ import annotations

import csv
import gzip
import shutil
import zlib
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from boltz.data.types import MSA

from foldcp.boltz.inputs.alignments import Alignments
from foldcp.boltz.run import current
from foldcp.runtime.files.names import Unsafe, regular

_FORM = {
    ".a3m": "an a3m file holds '>name' lines, each followed by one line of aligned residues",
    ".csv": "a csv file holds the columns 'key' and 'sequence', one aligned sequence per row",
}


class Unreadable(BaseException):
    """An input cannot be used, as the message says.

    Not an `Exception`: Boltz answers those with a traceback.
    """


def unpacked(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Boltz's parser of one kind of input so that alignments may be packed and in any case.

    Boltz reads `.a3m` and `.csv` only, although its parsers of both would unpack.

    Args:
        stock: `parse_yaml` or `parse_fasta`.
    """

    @wraps(stock)
    def parse(path: Path, *args: Any, **options: Any) -> Any:
        target = stock(path, *args, **options)
        run = current()
        if run is not None and run.alignments.unpacked is not None:
            for chain in target.record.chains:
                if isinstance(chain.msa_id, str):
                    chain.msa_id = _plain(chain.msa_id, run.alignments, run.alignments.unpacked)
        return target

    return parse


def _plain(name: str, alignments: Alignments, folder: Path) -> str:
    """The file itself, or one made of it under a name that Boltz reads."""
    path = Path(name)
    packed = path.suffix.lower() == ".gz"
    kind = Path(path.stem if packed else path.name).suffix.lower()
    if path.suffix in _FORM or kind not in _FORM or not path.is_file():
        return name
    known = next((made for made, source in alignments.made.items() if source == path), None)
    if known is None:
        known = folder / f"{len(alignments.made)}{kind}"
        known.parent.mkdir(parents=True, exist_ok=True)
        alignments.made[known] = path
        try:
            with (gzip.open if packed else open)(path, "rb") as source, known.open("wb") as made:
                shutil.copyfileobj(source, made)
        except gzip.BadGzipFile as error:
            raise unreadable(path, "it cannot be unpacked: gzip did not make it") from error
        except (EOFError, zlib.error) as error:
            raise unreadable(path, "it cannot be unpacked: it is damaged or cut short") from error
    return str(known)


def checked(stock: Callable[..., MSA]) -> Callable[..., MSA]:
    """Wrap Boltz's parser of one kind of alignment so that messages name the file.

    Args:
        stock: `parse_a3m` or `parse_csv`.

    Returns:
        A parser that raises `Unreadable` for whatever `stock` fails on, or would let pass although
        it is no alignment.
    """

    @wraps(stock)
    def parse(path: Path, *args: Any, **options: Any) -> MSA:
        run = current()
        if run is None:
            return stock(path, *args, **options)
        source = run.alignments.source(path)
        try:
            msa = stock(regular(path), *args, **options)
        except Unsafe as error:
            raise Unreadable(f"the MSA {error}: correct its path in the input") from error
        except OSError as error:
            raise unreadable(source, error.strerror or str(error)) from error
        except UnicodeDecodeError as error:
            with path.open("rb") as file:
                packed = file.read(2) == b"\x1f\x8b"
            what = "it is packed by gzip: let its name end in .gz" if packed else "it is not text"
            raise unreadable(source, what) from error
        except KeyError as error:
            what = "is a byte order mark" if error.args == ("\ufeff",) else "stands for no residue"
            raise unreadable(source, f"the letter {error} {what}") from error
        except UnboundLocalError as error:
            raise unreadable(source, "its first sequence has no '>name' line above") from error
        except AttributeError as error:  # of the missing value that pandas puts there
            raise unreadable(source, "a row has no sequence") from error
        except Exception as error:
            if path.suffix == ".csv" and (where := _wrong_key(path)):
                raise unreadable(source, where) from error
            if "invalid literal" in str(error):  # pandas takes what is too much for an index
                raise unreadable(source, "a row has more than two columns") from error
            if "EOF inside string" in str(error):
                raise unreadable(source, "a quotation mark is not closed") from error
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise unreadable(source, lines[0]) from error
        if len(msa.sequences) == 0:
            raise unreadable(source, "it has no sequences; `msa: empty` folds without any")
        run.alignments.read.append(source)
        return msa

    return parse


def checked_template(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Boltz's parser of one kind of template so that it reads regular files only.

    Args:
        stock: `parse_mmcif` or `parse_pdb`.
    """

    @wraps(stock)
    def parse(path: str, *args: Any, **options: Any) -> Any:
        if current() is not None:
            try:
                regular(Path(path))
            except Unsafe as error:
                raise Unreadable(f"the template {error}: correct its path in the input") from error
        return stock(path, *args, **options)

    return parse


def _wrong_key(path: Path) -> str:
    """Return the line of a csv file whose key is not a number, or ""."""
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        for row in rows:
            key = (row.get("key") or "").strip()
            try:
                if key and abs(int(float(key))) >= 2**31:
                    raise ValueError(key)
            except (ValueError, OverflowError):
                return f"line {rows.line_num}: the key '{key[:40]}' is no whole number below 2**31"
    return ""


def unreadable(path: Path, why: str) -> Unreadable:
    """Make the error for an alignment that cannot be used.

    Args:
        path: of the user's file.
        why: it cannot be.
    """
    form = next((text for kind, text in _FORM.items() if kind in path.name.lower()), "")
    return Unreadable(f"the MSA {path} cannot be used ({why}): correct the file; {form}")
