"""Count the tokens, atoms and alignment rows of an input, without folding it."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from foldcp.boltz.document import schema
from foldcp.boltz.document.explain import explain
from foldcp.boltz.document.faults import visible
from foldcp.boltz.document.reading import read_fasta, read_yaml
from foldcp.boltz.document.setting import Setting
from foldcp.errors import UserError
from foldcp.runtime.files.names import regular

_FASTA = (".fa", ".fas", ".fasta")


@dataclass(frozen=True)
class InputSizes:
    """Sizes of one input.

    Args:
        name: of the input.
        tokens: N.
        atoms: A.
        sequences: rows of the alignment.
        templates: structures that it reads.
        notes: what was assumed, a sentence each.
    """

    name: str
    tokens: int
    atoms: int
    sequences: int
    templates: int
    notes: tuple[str, ...]


def count(path: Path, options: Mapping[str, Any]) -> InputSizes:
    """Count what a prediction of an input would fold, with Boltz's own parser and tokeniser.

    Without Boltz's dictionary of molecules, residues and SMILES are counted from the document.

    Args:
        path: of a YAML or FASTA file.
        options: of `boltz predict`.

    Raises:
        UserError: the input is wrong, or names molecules of a dictionary that is not there.
    """
    boltz2 = options["model"] == "boltz2"
    cache = Path(options["cache"]).expanduser()
    molecules = cache / ("mols" if boltz2 else "ccd.pkl")
    has_residue = None
    if boltz2 and molecules.is_dir():

        def has_residue(code: str) -> bool:
            return "/" not in code and (molecules / f"{code}.pkl").exists()

    try:
        faults = schema.check(path, Setting(boltz2, True, "mmcif", has_residue))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check the path") from error
    if faults.found:
        raise UserError(f"{path.name}: {faults.message()}")
    if molecules.exists():
        return _parsed(path, molecules, cache / "mols", boltz2, options)
    return _documented(path, molecules, options)


@lru_cache(maxsize=2)
def _dictionary(molecules: Path, boltz2: bool) -> dict[str, Any]:
    if boltz2:
        from boltz.data.mol import load_canonicals

        found: dict[str, Any] = load_canonicals(molecules)
        return found
    with molecules.open("rb") as file:
        return dict(pickle.load(file))  # noqa: S301 - Boltz's own file, which it reads alike


def _parsed(
    path: Path, molecules: Path, folder: Path, boltz2: bool, options: Mapping[str, Any]
) -> InputSizes:
    import_module("rdkit.Chem.Descriptors")  # before the parser, which takes it for imported
    from boltz.data.parse.fasta import parse_fasta
    from boltz.data.parse.yaml import parse_yaml

    parse = parse_fasta if path.suffix.lower() in _FASTA else parse_yaml
    try:
        with redirect_stdout(io.StringIO()):  # the parser's remarks are no part of a plan
            target = parse(path, _dictionary(molecules, boltz2), folder, boltz2)
        tokens = _tokens(target.structure, boltz2)
    except Exception as error:
        raise UserError(f"{visible(path.name)}: {explain(error)}") from error
    named = [chain.msa_id for chain in target.record.chains if not chain.mol_type]
    rows, notes = _rows(named, options)
    return InputSizes(
        path.stem, tokens, len(target.structure.atoms), rows, len(target.templates or {}), notes
    )


def _tokens(structure: Any, boltz2: bool) -> int:
    if boltz2:
        from boltz.data.tokenize.boltz2 import tokenize_structure

        return len(tokenize_structure(structure)[0])
    from boltz.data.tokenize.boltz import BoltzTokenizer
    from boltz.data.types import Input

    return len(BoltzTokenizer().tokenize(Input(structure, {})).tokens)


def _rows(named: list[Any], options: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Count rows of the alignments that proteins name: a path, -1 for none, 0 for the server."""
    from boltz.data.parse.a3m import parse_a3m
    from boltz.data.parse.csv import parse_csv

    most, rows, notes = int(options["max_msa_seqs"]), 1, []
    for one in dict.fromkeys(named):
        if one == 0:
            notes = [f"a protein without `msa`: {most} rows assumed, the most of --max_msa_seqs"]
            rows = most
        elif one != -1:
            try:
                path = regular(Path(one))
                if ".csv" in path.suffixes:
                    found = parse_csv(path, max_seqs=most)
                else:
                    found = parse_a3m(path, taxonomy=None, max_seqs=most)
            except Exception as error:
                raise UserError(f"cannot read the alignment {one}: {explain(error)}") from error
            rows = max(rows, len(found.sequences))
    return min(rows, most), tuple(notes)


def _documented(path: Path, molecules: Path, options: Mapping[str, Any]) -> InputSizes:
    from boltz.data import const
    from rdkit import Chem

    letters = {
        "protein": const.prot_letter_to_token,
        "dna": const.dna_letter_to_token,
        "rna": const.rna_letter_to_token,
    }
    document = read_fasta(path) if path.suffix.lower() in _FASTA else read_yaml(path)
    tokens, atoms, named = 0, 0, []
    for item in document["sequences"]:
        ((kind, fields),) = item.items()
        copies = len(fields["id"]) if isinstance(fields["id"], list) else 1
        if fields.get("modifications") or fields.get("ccd"):
            raise UserError(
                f"{path.name}: the atoms of `ccd` codes are in Boltz's dictionary, and there is no "
                f"{molecules}: name its folder with --cache, or give --tokens and --atoms"
            )
        if kind.lower() in letters:
            known = letters[kind.lower()]
            found = [len(const.ref_atoms[known[x]]) for x in fields["sequence"]]
            tokens, atoms = tokens + copies * len(found), atoms + copies * sum(found)
        else:
            heavy = Chem.MolFromSmiles(fields["smiles"]).GetNumHeavyAtoms()
            tokens, atoms = tokens + copies * heavy, atoms + copies * heavy
        if kind.lower() == "protein":
            msa = fields.get("msa")
            named.append(-1 if msa == "empty" else msa or 0)
    rows, notes = _rows(named, options)
    told = f"counted from the document, without Boltz's parser: there is no {molecules}"
    templates = len(document.get("templates") or ())
    return InputSizes(path.stem, tokens, atoms, rows, templates, (told, *notes))
