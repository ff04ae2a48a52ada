"""Check the chains of a document: `sequences`."""

from __future__ import annotations

import re
from typing import Any

from foldcp.boltz.document import contents
from foldcp.boltz.document.faults import Faults, nearest, quoted, shortened, spelt
from foldcp.boltz.document.reading import Fields, Mark
from foldcp.boltz.document.setting import LONGEST, Chain, Setting

FIELDS = {
    "protein": ("id", "sequence", "msa", "modifications", "cyclic"),
    "dna": ("id", "sequence", "modifications", "cyclic"),
    "rna": ("id", "sequence", "modifications", "cyclic"),
    "ligand": ("id", "ccd", "smiles", "cyclic"),
}


def check(document: Fields, faults: Faults, setting: Setting) -> dict[str, Chain]:
    """Collect the chains by id, as far as they can be read.

    Args:
        document: the document.
        faults: collects what is wrong.
        setting: what the document is read for.
    """
    if "sequences" not in document:
        faults.add(0, "it has no `sequences`: list its chains there, each with a dash")
        return {}
    items = faults.entries(document, "sequences", "protein: {id: A, sequence: MKTAYIAK}")
    line = document.mark("sequences").line
    if not items and document["sequences"] is not None and not faults.found:
        faults.add(line, "`sequences` holds no chain")
    chains: dict[str, Chain] = {}
    entities: dict[tuple[str, str], tuple[int, Fields]] = {}
    for item, mark in zip(items, items.marks, strict=True):
        _entity(item, mark, chains, entities, faults, setting)
    return chains


def _entity(
    item: Any,
    mark: Mark,
    chains: dict[str, Chain],
    entities: dict[tuple[str, str], tuple[int, Fields]],
    faults: Faults,
    setting: Setting,
) -> None:
    opened = open_entry(item, mark, tuple(FIELDS), "an entry of `sequences`", faults)
    if opened is None:
        return
    kind, fields = opened
    faults.keys(fields, (*FIELDS[kind], *(("msa",) if kind != "protein" else ())), kind)
    line = fields.line or mark.line
    new = _ids(fields, kind, line, chains, faults, setting)
    where = f"{kind} {new[0].id}" if new else kind
    content = (
        contents.ligand(fields, where, faults)
        if kind == "ligand"
        else contents.polymer(fields, kind, where, faults)
    )
    if content is None:
        return
    written, residues = content
    number, first = entities.setdefault((kind, str(written)), (len(entities), fields))
    if kind != "ligand":  # Boltz takes the modifications of the entity's first entry
        sink = faults if first is fields else Faults()
        residues = contents.modified(first, list(residues), where, sink, setting)
    for chain in new:
        chain.entity, chain.residues = number, residues
    if first is not fields:
        _compare(first, fields, where, faults)
    if kind == "ligand":
        if faults.truth(fields, "cyclic", where):
            faults.add(fields.mark("cyclic").line, f"{where} cannot be cyclic: only polymers can")
        contents.known(residues, fields.mark("ccd").line, where, faults, setting)
    else:
        faults.truth(fields, "cyclic", where)


def open_entry(
    item: Any, mark: Mark, kinds: tuple[str, ...], what: str, faults: Faults
) -> tuple[str, Fields] | None:
    """Open a list entry such as `- protein: {...}` as (kind, fields); Boltz takes its first key.

    Args:
        item: the entry.
        mark: its line.
        kinds: names that it may have.
        what: its name in messages.
        faults: collects what is wrong.
    """
    named = " or ".join([", ".join(kinds[:-1]), kinds[-1]]) if len(kinds) > 1 else kinds[0]
    if not isinstance(item, Fields) or not item:
        faults.add(mark.line, f"{what} must be {named} and a colon, got {quoted(item, mark)}")
        return None
    for key, line, _ in item.twice:
        faults.add(line, f"`{spelt(key)}` is given twice in {what}: begin the second with a dash")
    kind = next(iter(item))
    line = item.mark(kind).line
    if kind not in kinds:
        near = nearest(spelt(kind), kinds)
        hint = f"did you mean `{near}`?" if near else f"it must be {named}"
        faults.add(line, f"`{spelt(kind)}` cannot begin {what}: {hint}")
        return None
    value = item[kind]
    others = [key for key in item if key != kind]
    if not isinstance(value, Fields):
        hint = (
            "indent its fields further than itself"
            if others
            else f"write its fields below `{kind}:`"
        )
        if isinstance(value, str) and re.match(r"\w+:\S", value):
            hint = "put a space after each colon"
        faults.add(line, f"`{kind}` must have fields, got {quoted(value, item.mark(kind))}: {hint}")
        return None
    for key in others:
        if key in kinds:
            faults.add(
                item.mark(key).line,
                f"`{key}` stands in the entry of a {kind}: begin it with a dash",
            )
        else:
            faults.note(
                item.mark(key).line,
                f"`{spelt(key)}` beside `{kind}` is not a field of Boltz and is ignored",
            )
    return kind, value


def _ids(
    fields: Fields, kind: str, line: int, chains: dict[str, Chain], faults: Faults, setting: Setting
) -> list[Chain]:
    if "id" not in fields:
        faults.add(line, f"{kind} has no `id`: add `id: A`")
        return []
    value, mark = fields["id"], fields.mark("id")
    many = isinstance(value, list)
    values = list(zip(value, value.marks, strict=True)) if many else [(value, mark)]
    if not values:
        faults.add(mark.line, f"`id` of {kind} is an empty list")
    new = []
    widest = 1 if setting.output_format == "pdb" else LONGEST
    for name, place in values:
        if not isinstance(name, str):
            faults.add(place.line, f"`id` of {kind} must be text, got {quoted(name, place)}")
        elif not name:
            faults.add(place.line, f"`id` of {kind} is empty")
        elif not name.isprintable():
            faults.add(
                place.line,
                f"chain id {name[:LONGEST]} holds a character that cannot be shown: remove it",
            )
        elif len(name) > LONGEST:
            faults.add(
                place.line,
                f"chain id {shortened(name)} is longer than {LONGEST} letters, of which Boltz "
                f"keeps {LONGEST}: shorten it",
            )
        elif len(name) > widest:
            faults.add(
                place.line,
                f"chain id {name} is longer than the one letter of a PDB file: shorten it, or use "
                "--output_format mmcif",
            )
        elif name in chains:
            faults.add(
                place.line,
                f"chain id {name} is given twice, first on line {chains[name].line}: give each "
                "chain its own",
            )
        else:
            chains[name] = Chain(name, kind, place.line)
            new.append(chains[name])
    return new


def _compare(first: Fields, fields: Fields, where: str, faults: Faults) -> None:
    """Note that Boltz reads one chain of several with the same sequence."""
    for key in ("modifications", "cyclic"):
        if (first.get(key) or None) != (fields.get(key) or None):
            line = fields.mark(key).line
            faults.note(
                line,
                f"`{key}` of {where}: Boltz takes that of the first chain with this sequence, on "
                f"line {first.line}, for all of them",
            )
