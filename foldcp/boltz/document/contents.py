"""Check what one chain consists of: its sequence and modifications, its codes or SMILES."""

from __future__ import annotations

from typing import Any

from boltz.data import const

from foldcp.boltz.document.faults import Faults, disguised, quoted, shortened
from foldcp.boltz.document.reading import Fields, Mark
from foldcp.boltz.document.setting import LONGEST, Setting

_EXAMPLE = {"protein": "MKTAYIAK", "dna": "GATTACA", "rna": "GAUUACA"}
# Codes of nucleotides that are not known for sure; Boltz folds an unknown one, as is meant.
_AMBIGUOUS = set("RYSWKMBDHVX")
_LETTERS = {
    "protein": (const.prot_letter_to_token, set()),
    "dna": (const.dna_letter_to_token, _AMBIGUOUS),
    "rna": (const.rna_letter_to_token, _AMBIGUOUS),
}


def polymer(fields: Fields, kind: str, where: str, faults: Faults) -> tuple[Any, list[str]] | None:
    """Read a polymer as (sequence, residues), None if it is not usable.

    Args:
        fields: the entity.
        kind: "protein", "dna" or "rna".
        where: its name in messages.
        faults: collects what is wrong.
    """
    value, mark = fields.get("sequence"), fields.mark("sequence")
    if "msa" in fields and kind != "protein" and fields["msa"] not in (None, "", "empty", 0, -1):
        faults.note(
            fields.mark("msa").line, f"`msa` of {where} is ignored: Boltz reads those of proteins"
        )
    if isinstance(value, list) and value and all(isinstance(x, str) and len(x) == 1 for x in value):
        text = "".join(value)  # Boltz takes single letters in a list, too
    else:
        text = faults.text(fields, "sequence", where, _EXAMPLE[kind])
        if text is None:
            return None
    tokens, ambiguous = _LETTERS[kind]
    unknown = const.unk_token[kind.upper()]
    wrong = [
        (i, c) for i, c in enumerate(text) if (c == "-" or c not in tokens) and c not in ambiguous
    ]
    if wrong:
        faults.add(mark.line, _wrong_letters(wrong, text, kind, where))
    return value, [tokens.get(c, unknown) for c in text]


def _wrong_letters(wrong: list[tuple[int, str]], text: str, kind: str, where: str) -> str:
    index, letter = wrong[0]
    name = {" ": "a space", "\t": "a tab", "\n": "a line break"}.get(letter, f"'{letter}'")
    if not letter.isascii() and letter.isprintable():  # it may look like another
        name = f"'{letter}' (U+{ord(letter):04X})"
    more = "" if len(wrong) == 1 else f" and {len(wrong) - 1} more"
    if letter == ">":
        hint = "give the sequence only, and each chain an entry or header of its own"
    elif letter.isspace():
        hint = "write the sequence without spaces or line breaks"
    elif all(c.islower() for _, c in wrong):
        hint = "write it in capitals"
    elif letter == "T" and kind == "rna":
        hint = "write U, or make it `dna`"
    elif letter == "U" and kind == "dna":
        hint = "write T, or make it `rna`"
    else:
        hint = f"write {'X' if kind == 'protein' else 'N'} for an unknown one, or leave it out"
    residue = "residue" if kind == "protein" else "nucleotide"
    return (
        f"{name} at position {index + 1} of the sequence of {where}{more} stands for no {residue}, "
        f"Boltz would fold an unknown one: {hint}"
    )


def modified(
    fields: Fields, residues: list[str], where: str, faults: Faults, setting: Setting
) -> list[str | None]:
    """Apply the entity's modifications to its residues.

    Args:
        fields: the entity.
        residues: names of its residues.
        where: its name in messages.
        faults: collects what is wrong.
        setting: what the document is read for.
    """
    found: list[str | None] = list(residues)
    items = faults.entries(fields, "modifications", "{position: 2, ccd: SEP}")
    for item, mark in zip(items, items.marks, strict=True):
        what = f"a modification of {where}"
        if not isinstance(item, Fields):
            faults.add(
                mark.line, f"{what} must be `{{position: 2, ccd: SEP}}`, got {quoted(item, mark)}"
            )
            continue
        faults.keys(item, ("position", "ccd"), what)
        for key in ("position", "ccd"):
            if key not in item:
                faults.add(item.line, f"{what} has no `{key}`: it needs `position` and `ccd`")
        position, place = item.get("position"), item.mark("position")
        if "position" not in item:
            pass
        elif isinstance(position, bool) or not isinstance(position, int):
            faults.add(
                place.line,
                f"`position` of {what} must be a whole number, got "
                f"{quoted(position, place, numeric=True)}",
            )
        elif odd := disguised(position, place):
            faults.add(place.line, f"`position` of {what}: {odd}")
        elif not 1 <= position <= len(residues):
            faults.add(
                place.line,
                f"`position` {shortened(place.text or str(position))} of {what} is not in its "
                f"sequence, which has 1 to {len(residues)}",
            )
        elif found[position - 1] is None:
            faults.add(place.line, f"{what} changes position {position} again: keep one")
        else:
            found[position - 1] = None
        if "ccd" in item:
            codes = _codes([(item["ccd"], item.mark("ccd"))], what, faults)
            known(codes, item.mark("ccd").line, what, faults, setting)
    return found


def ligand(fields: Fields, where: str, faults: Faults) -> tuple[Any, list[str | None]] | None:
    """Read a ligand as (ccd or SMILES, residues), None if it is not usable.

    Args:
        fields: the entity.
        where: its name in messages.
        faults: collects what is wrong.
    """
    given = [key for key in ("ccd", "smiles") if key in fields]
    if len(given) != 1:
        has = (
            "both `ccd` and `smiles`: keep one" if given else "neither `ccd` nor `smiles`: add one"
        )
        line = fields.mark(given[1]).line if given else fields.line
        faults.add(line, f"{where} has {has}")
        return None
    (key,) = given
    value, mark = fields[key], fields.mark(key)
    if key == "smiles":
        if isinstance(value, list):
            faults.add(
                mark.line, f"`smiles` of {where} is read as a list by YAML: put it in quotes"
            )
            return None
        text = faults.text(fields, "smiles", where, "CCO")
        why = None if text is None else smiles_fault(text)
        if why:
            faults.add(mark.line, f"`smiles` of {where}, {shortened(text or '')}, {why}")
        return (value, [None]) if text is not None and why is None else None
    many = isinstance(value, list)
    if many and not value:
        faults.add(mark.line, f"`ccd` of {where} is an empty list")
        return None
    if not many and not isinstance(value, str):
        faults.add(
            mark.line, f"`ccd` of {where} must be a code such as ATP, got {quoted(value, mark)}"
        )
        return None
    values = list(zip(value, value.marks, strict=True)) if many else [(value, mark)]
    codes = _codes(values, where, faults)
    return (value, codes) if len(codes) == len(values) else None


def _codes(values: list[tuple[Any, Mark]], where: str, faults: Faults) -> list[str | None]:
    """Codes of residues; the reading has made text of what YAML takes for a number."""
    found: list[str | None] = []
    for value, mark in values:
        if not isinstance(value, str):
            faults.add(
                mark.line, f"`ccd` of {where} must be a code such as ATP, got {quoted(value, mark)}"
            )
        elif not value:
            faults.add(mark.line, f"`ccd` of {where} is empty")
        elif len(value) > LONGEST:
            faults.add(
                mark.line,
                f"`ccd` of {where}, {value[:40]}, is longer than the {LONGEST} letters of a "
                "code; a SMILES goes into `smiles`",
            )
        else:
            found.append(value)
    return found


def known(codes: list[str | None], line: int, where: str, faults: Faults, setting: Setting) -> None:
    """Refuse codes of residues that Boltz does not have.

    Args:
        codes: of the residues; None where a modification was wrong.
        line: of the entity.
        where: its name in messages.
        faults: collects what is wrong.
        setting: what the document is read for.
    """
    if setting.has_residue is None:
        return
    for code in codes:
        if code is not None and not setting.has_residue(code):
            upper = code.strip().upper()
            hint = "look it up at rcsb.org/ligand, or give a `smiles`"
            if upper != code and setting.has_residue(upper):
                hint = f"did you mean {upper}?"
            faults.add(line, f"`ccd` of {where}: there is no {code} in Boltz's dictionary, {hint}")


def smiles_fault(text: str) -> str | None:
    """Return the reason why RDKit cannot read a SMILES, None if it can."""
    from rdkit import Chem, rdBase

    blocker = rdBase.BlockLogs()
    try:
        mol = Chem.MolFromSmiles(text)
        if mol is not None:
            return "has no atoms" if mol.GetNumAtoms() == 0 else None
        mol = Chem.MolFromSmiles(text, sanitize=False)
        if mol is None:
            pairs = [f"{o}{c}" for o, c in ("()", "[]") if text.count(o) != text.count(c)]
            hint = f": {' and '.join(pairs)} do not pair up" if pairs else ""
            return f"is no SMILES{hint}"
        Chem.SanitizeMol(mol)
    except (ValueError, RuntimeError) as error:
        return f"is no possible molecule ({' '.join(str(error).split())})"
    finally:
        del blocker
    return "is no possible molecule"
