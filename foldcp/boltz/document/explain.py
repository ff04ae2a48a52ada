"""Say in a sentence what Boltz's parsers, RDKit or gemmi could not read."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any

from foldcp.boltz.document.faults import or_nearest
from foldcp.boltz.run import current

_SIGNATURE = ("Python argument types", "did not match C++", "Boost.Python")
_KNOWN = {
    "Molecule is excluded": "the ligand of the affinity is a salt, a metal or a mixture, for which "
    "Boltz predicts none: give the organic molecule alone",
    "Pre-condition Violation": "the ligand of the affinity consists of several molecules, such as "
    "a salt and its ion, which Boltz cannot bring into standard form: give the main one alone",
    "Molecule is broken": "the ligand of the affinity cannot be brought into standard form: "
    "correct its SMILES",
    "No chains parsed!": "it holds no chain",
    "Conformer does not exist.": "a molecule of Boltz's dictionary has no coordinates: give the "
    "ligand as `smiles`",
}


_LIGAND = {
    "Failed to compute 3D conformer for": "RDKit finds no three-dimensional form of a ligand: "
    "correct the rings and stereo marks of its SMILES, or give its `ccd`",
    "has an atom with a name longer than 4": "a ligand has more atoms of one element than Boltz "
    "can name with 4 characters: give it as several, bonded ligands",
}


class BadTemplate(Exception):
    """A template cannot be used, as the message says."""


def explain(error: BaseException) -> str:
    """Explain an error in the user's words, without Python's.

    Args:
        error: raised while an input was read.
    """
    text = " ".join(str(error).split())
    if isinstance(error, (BadTemplate, OSError)):
        return text
    if isinstance(error, KeyError) and isinstance(error.args[0], tuple) and len(error.args[0]) == 3:
        return _missing_atom(error.args[0], error.__traceback__)
    if text.startswith("Template chain "):
        return _missing_template_chain(error.__traceback__)
    for phrase, meant in _LIGAND.items():
        if phrase in text:  # with the whole SMILES, which may be longer than a message
            return f"{meant} ({_short(text, phrase)})"
    for phrase, meant in _KNOWN.items():
        if phrase in text:
            return meant
    wordless = (KeyError, IndexError, TypeError, AttributeError, AssertionError, StopIteration)
    if text and not isinstance(error, wordless) and not any(s in text for s in _SIGNATURE):
        return text
    if isinstance(error, AssertionError) and text:
        return text
    return f"Boltz's parser cannot read it{_place(error)}"


def _short(text: str, phrase: str) -> str:
    """The SMILES of a message of Boltz's, which stands before or after what is `said` of it."""
    smiles = text.replace("SMILES", "").partition(phrase)
    found = (smiles[0] or smiles[2]).strip()
    return f"{found[:40]}{'...' * (len(found) > 40)}"


def _place(error: BaseException) -> str:
    """Name the place where Boltz or a library gave up, for a bug report."""
    frames = traceback.extract_tb(error.__traceback__)
    last = next(
        (f for f in reversed(frames) if "boltz" in f.filename), frames[-1] if frames else None
    )
    kind = type(error).__name__
    return (
        f" ({kind} in {last.name}, {Path(last.filename).name} line {last.lineno})" if last else ""
    )


def _local(trace: TracebackType | None, name: str) -> Any:
    """A variable of the frame that has it, the innermost first."""
    found = None
    while trace is not None:
        found = trace.tb_frame.f_locals.get(name, found)
        trace = trace.tb_next
    return found


def _missing_atom(key: tuple[Any, Any, Any], trace: TracebackType | None) -> str:
    chain, residue, atom = key
    atoms = _local(trace, "atom_idx_map") or {}
    there = [a for c, r, a in atoms if c == chain and r == residue]
    if not there:
        return f"a constraint names residue {residue + 1} of chain {chain}, which is not there"
    return (
        f"a constraint names atom {atom} of residue {residue + 1} of chain {chain}, which has none "
        f"of that name: {or_nearest(atom, there, 'atoms')}"
    )


def _missing_template_chain(trace: TracebackType | None) -> str:
    proteins = sorted(_local(trace, "template_proteins") or ())
    chain, name = _local(trace, "chain_id"), _local(trace, "template_id")
    there = or_nearest(chain, proteins, "its protein chains")
    return f"`template_id`: template {name} has no protein chain {chain}, {there}"


def readable(stock: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """Wrap Boltz's parser of one kind of template so that messages name the file.

    Args:
        stock: `parse_mmcif` or `parse_pdb`.
        kind: "mmCIF" or "PDB".
    """

    @wraps(stock)
    def parse(path: str | Path, *args: Any, **options: Any) -> Any:
        if current() is None:
            return stock(path, *args, **options)
        try:
            return stock(path, *args, **options)
        except BadTemplate:  # parse_pdb calls parse_mmcif
            raise
        except Exception as error:
            raise BadTemplate(
                f"template {path} cannot be used: {_template(path, error, kind)}"
            ) from error

    return parse


def _template(path: str | Path, error: Exception, kind: str) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    import gemmi

    other = gemmi.CoorFormat.Pdb if kind == "mmCIF" else gemmi.CoorFormat.Mmcif
    with suppress(Exception):
        if gemmi.read_structure(str(path), format=other)[0].count_atom_sites():
            field, name = ("pdb", "PDB") if kind == "mmCIF" else ("cif", "mmCIF")
            return f"it is a {name} file: write `{field}:` before its path"
    text = " ".join(str(error).split())
    try:
        structure = gemmi.read_structure(str(path))
    except Exception:
        return f"it is not a {kind} file ({text[:120]})"
    if len(structure) == 0:
        return "it has no model, that is no atoms"
    structure.setup_entities()
    polymers = [e for e in structure.entities if e.entity_type.name == "Polymer"]
    if not polymers:
        return "it has no polymer chain"
    if any(len(entity.full_sequence) == 0 for entity in polymers):
        where = "SEQRES records" if kind == "PDB" else "the categories entity and entity_poly_seq"
        return f"it lacks {where}, from which Boltz takes the sequence: add them"
    if isinstance(error, KeyError) and kind == "mmCIF":
        return "it lacks the categories entity and struct_asym, which tell its chains: add them"
    return explain(error)
