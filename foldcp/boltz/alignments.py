"""Alignments that cannot be used: found while an input is read, and named with what to do.

Stock ends in a traceback without the file's name, folds the chain as if it had no alignment, or
fails when the features are computed.
"""

from __future__ import annotations

import csv
import gzip
import shutil
import sys
import zlib
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
from boltz.data import const
from boltz.data.types import MSA, Record, StructureV2
from tqdm import tqdm

from foldcp.boltz.run import current
from foldcp.names import Unsafe, regular

_FORM = {
    ".a3m": "an a3m file holds '>name' lines, each followed by one line of aligned residues",
    ".csv": "a csv file holds the columns 'key' and 'sequence', one aligned sequence per row",
}

read: list[Path] = []  # files that were parsed for the input under way, in order
_made: dict[Path, Path] = {}  # what those were unpacked or copied from
_folder: list[Path] = []  # for unpacked files, while an input is read


class Unreadable(BaseException):
    """An input cannot be used, as the message says.

    Not an `Exception`: Boltz answers those with a traceback.
    """


def begin(folder: Path) -> None:
    """Begin an input.

    Args:
        folder: where alignments may be unpacked; removed with what is left of the input.
    """
    read.clear()
    _made.clear()
    _folder[:] = [folder]


def unpacked(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Boltz's parser of one kind of input, whose alignments may be packed and in any case.

    Boltz reads `.a3m` and `.csv` only, although its parsers of both would unpack.

    Args:
        stock: `parse_yaml` or `parse_fasta`.
    """

    @wraps(stock)
    def parse(path: Path, *args: Any, **options: Any) -> Any:
        target = stock(path, *args, **options)
        if current() is not None and _folder:
            for chain in target.record.chains:
                if isinstance(chain.msa_id, str):
                    chain.msa_id = _plain(chain.msa_id)
        return target

    return parse


def _plain(name: str) -> str:
    """The file itself, or one made of it under a name that Boltz reads."""
    path = Path(name)
    packed = path.suffix.lower() == ".gz"
    kind = Path(path.stem if packed else path.name).suffix.lower()
    if path.suffix in _FORM or kind not in _FORM or not path.is_file():
        return name
    known = next((made for made, source in _made.items() if source == path), None)
    if known is None:
        known = _folder[0] / f"{len(_made)}{kind}"
        known.parent.mkdir(parents=True, exist_ok=True)
        _made[known] = path
        try:
            with (gzip.open if packed else open)(path, "rb") as source, known.open("wb") as made:
                shutil.copyfileobj(source, made)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise _unreadable(path, f"it cannot be unpacked: {error}") from error
    return str(known)


def checked(stock: Callable[..., MSA]) -> Callable[..., MSA]:
    """Boltz's parser of one kind of alignment, with messages that name the file.

    Args:
        stock: `parse_a3m` or `parse_csv`.

    Returns:
        A parser that raises `Unreadable` for whatever `stock` fails on, or would let pass although
        it is no alignment.
    """

    @wraps(stock)
    def parse(path: Path, *args: Any, **options: Any) -> MSA:
        if current() is None:
            return stock(path, *args, **options)
        try:
            msa = stock(regular(path), *args, **options)
        except Unsafe as error:
            raise Unreadable(f"the MSA {error}: correct its path in the input") from error
        except OSError as error:
            raise _unreadable(path, error.strerror or str(error)) from error
        except UnicodeDecodeError as error:
            raise _unreadable(path, "it is not text") from error
        except KeyError as error:
            raise _unreadable(path, f"the letter {error} stands for no residue") from error
        except AttributeError as error:  # of the missing value that pandas puts there
            raise _unreadable(path, "a row has no sequence") from error
        except Exception as error:
            if path.suffix == ".csv" and (where := _wrong_key(path)):
                raise _unreadable(path, where) from error
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise _unreadable(path, lines[0]) from error
        _check_rows(path, msa)
        read.append(_made.get(path, path))
        return msa

    return parse


def checked_template(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Boltz's parser of one kind of template, which reads regular files only.

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
    """Where a csv file has a key that is no number, or ""."""
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


def _unreadable(path: Path, why: str) -> Unreadable:
    path = _made.get(path, path)
    form = next((text for kind, text in _FORM.items() if kind in path.name.lower()), "")
    return Unreadable(f"the MSA {path} cannot be used ({why}): correct the file; {form}")


def _check_rows(path: Path, msa: MSA) -> None:
    if len(msa.sequences) == 0:
        raise _unreadable(path, "it has no sequences")
    lengths = msa.sequences["res_end"] - msa.sequences["res_start"]
    wrong = np.flatnonzero(lengths != lengths[0])
    if len(wrong):
        row = int(wrong[0])
        raise _unreadable(
            path,
            f"sequence {row + 1} has {lengths[row]} aligned positions and the first one "
            f"{lengths[0]}; insertions are lower case, gaps '-'",
        )


def check_queries(record: Record, structure: StructureV2, folder: Path) -> None:
    """Compare the first row of each alignment with the chain that it is for.

    Args:
        record: of an input that was just read, see `read`. structure: its chains and residues.
        folder: of its processed alignments, numbered in the order in which they were parsed.

    Raises:
        Unreadable: a first row has another length than the chain. One that differs in its residues
            is named on standard error: Boltz then folds the chain without the alignment.
    """
    for chain in record.chains:
        if chain.msa_id == -1:
            continue
        path = read[int(str(chain.msa_id).rpartition("_")[2])]
        msa = MSA.load(folder / f"{chain.msa_id}.npz")
        first = msa.sequences[0]
        query = msa.residues["res_type"][first["res_start"] : first["res_end"]]
        place = structure.chains[chain.chain_id]
        residues = structure.residues[place["res_idx"] : place["res_idx"] + place["res_num"]]
        wanted = residues["res_type"]
        if len(query) != len(wanted):
            raise _unreadable(
                path,
                f"its first sequence has {len(query)} residues and chain {chain.chain_name} has "
                f"{len(wanted)}; the first sequence must be the chain's own",
            )
        _warn_of_other_residues(path, chain.chain_name, query, wanted)


def _warn_of_other_residues(path: Path, chain: str, query: np.ndarray, wanted: np.ndarray) -> None:
    met, unk = const.token_ids["MET"], const.token_ids["UNK"]
    at = np.flatnonzero(query != wanted)
    # Boltz takes the chain's own residues where one side is unknown.
    known = (wanted[at] == met).all() and (query[at] == unk).all()
    if len(at) == 0 or known or (wanted[at] == unk).all():
        return
    mine, theirs = const.tokens[wanted[at[0]]], const.tokens[query[at[0]]]
    tqdm.write(  # not print: Boltz shows a progress bar
        f"foldcp: the MSA {path} is not used for chain {chain}: its first sequence differs from "
        f"the chain's in {len(at)} residues (at {at[0] + 1} {theirs} instead of {mine}); put the "
        "chain's own sequence first",
        file=sys.stderr,
    )
