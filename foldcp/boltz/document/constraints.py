"""Check `constraints` of a document."""

from __future__ import annotations

from typing import Any

from boltz.data import const

from foldcp.boltz.document.chains import open_entry
from foldcp.boltz.document.faults import (
    Faults,
    disguised,
    or_nearest,
    quoted,
    shortened,
    spelt,
    whole,
)
from foldcp.boltz.document.reading import Fields, Items, Mark
from foldcp.boltz.document.setting import Chain, Setting

_BOND = ("atom1", "atom2")
_POCKET = ("binder", "contacts", "max_distance", "force")
_CONTACT = ("token1", "token2", "max_distance", "force")


def check(document: Fields, chains: dict[str, Chain], faults: Faults, setting: Setting) -> None:
    """Check `constraints`.

    Args:
        document: the document.
        chains: chains by id.
        faults: collects what is wrong.
        setting: what the document is read for.
    """
    pockets = 0
    items = faults.entries(document, "constraints", "bond: {...}")
    for item, mark in zip(items, items.marks, strict=True):
        opened = open_entry(
            item, mark, ("bond", "pocket", "contact"), "an entry of `constraints`", faults
        )
        if opened is None:
            continue
        kind, fields = opened
        where = f"the {kind}"
        if kind == "bond":
            needs(fields, _BOND, _BOND, where, faults)
            for key in _BOND:
                _atom(fields, key, chains, faults)
            continue
        faults.truth(fields, "force", where)
        distance = faults.number(fields, "max_distance", where)
        if kind == "pocket":
            pockets += 1
            _pocket(fields, chains, faults)
            if not setting.boltz2 and pockets > 1:
                faults.add(mark.line, "Boltz-1 takes one pocket: remove the others, or use Boltz-2")
            if not setting.boltz2 and distance not in (None, 6.0):
                faults.add(
                    fields.mark("max_distance").line,
                    "Boltz-1 takes no other `max_distance` than 6: remove it, or use Boltz-2",
                )
        else:
            needs(fields, ("token1", "token2"), _CONTACT, where, faults)
            for key in ("token1", "token2"):
                if key in fields:
                    _token(fields[key], fields.mark(key), f"`{key}` of the contact", chains, faults)
            if not setting.boltz2:
                faults.add(mark.line, "Boltz-1 takes no contacts: remove this one, or use Boltz-2")


def needs(
    fields: Fields, needed: tuple[str, ...], allowed: tuple[str, ...], where: str, faults: Faults
) -> None:
    """Require fields of a constraint, and refuse those that it does not have.

    Args:
        fields: the constraint.
        needed: fields that it must have.
        allowed: fields that it may have.
        where: its name in messages.
        faults: collects what is wrong.
    """
    faults.keys(fields, allowed, where)
    for key in needed:
        if key not in fields:
            faults.add(
                fields.line,
                f"{where} has no `{key}`: it needs {' and '.join(f'`{k}`' for k in needed)}",
            )


def _pocket(fields: Fields, chains: dict[str, Chain], faults: Faults) -> None:
    needs(fields, ("binder", "contacts"), _POCKET, "the pocket", faults)
    if "binder" in fields:
        known_chain(
            fields["binder"], fields.mark("binder"), "`binder` of the pocket", chains, faults
        )
    if "contacts" not in fields:
        return
    contacts, mark = fields["contacts"], fields.mark("contacts")
    form = "a list of pairs, such as `[[A, 2], [A, 5]]`"
    if not isinstance(contacts, Items):
        faults.add(
            mark.line, f"`contacts` of the pocket must be {form}, got {quoted(contacts, mark)}"
        )
    elif len(contacts) == 2 and not any(isinstance(x, list) for x in contacts):
        faults.add(
            mark.line,
            f"`contacts` of the pocket must be {form}: write "
            f"[[{spelt(contacts[0])}, {spelt(contacts[1])}]]",
        )
    else:
        if not contacts:
            faults.note(mark.line, "`contacts` of the pocket is an empty list, so it has no effect")
        for item, place in zip(contacts, contacts.marks, strict=True):
            _token(item, place, "a contact of the pocket", chains, faults)


def known_chain(
    value: Any, mark: Mark, what: str, chains: dict[str, Chain], faults: Faults
) -> Chain | None:
    """Look up the chain that a value names; None, and a fault, if there is none.

    Args:
        value: the chain's id.
        mark: its line.
        what: the field's name in messages.
        chains: chains by id.
        faults: collects what is wrong.
    """
    if not isinstance(value, str):
        faults.add(mark.line, f"{what} must be a chain's id, got {quoted(value, mark)}")
    elif value not in chains:
        faults.add(
            mark.line,
            f"{what} is chain {shortened(value)}, which the input does not have: "
            f"{or_nearest(value, chains, 'chains')}",
        )
    else:
        return chains[value]
    return None


def _token(value: Any, mark: Mark, what: str, chains: dict[str, Chain], faults: Faults) -> None:
    """A residue of a polymer by number, or an atom of a ligand by name."""
    form = "[chain, residue number], or [chain, atom name] of a ligand"
    if not isinstance(value, Items) or len(value) != 2:
        faults.add(mark.line, f"{what} must be {form}, got {quoted(value, mark)}")
        return
    chain = known_chain(value[0], value.marks[0], what, chains, faults)
    place, line = value[1], value.marks[1].line
    if chain is None:
        return
    if chain.kind == "ligand":
        if not isinstance(place, str):
            faults.add(
                line,
                f"{what} with ligand {chain.id} is by atom name, "
                f"got {quoted(place, value.marks[1])}",
            )
        return
    number, length = whole(place), len(chain.residues)
    if number is None:
        faults.add(
            line,
            f"{what} with {chain.kind} {chain.id} is by residue number, got "
            f"{quoted(place, value.marks[1], numeric=True)}",
        )
    elif odd := disguised(place, value.marks[1]):
        faults.add(line, f"{what}: {odd}")
    elif length and not 1 <= number <= length:
        faults.add(line, f"{what} is residue {number} of chain {chain.id}, which has 1 to {length}")


def _atom(fields: Fields, key: str, chains: dict[str, Chain], faults: Faults) -> None:
    """An atom of a bond: chain, residue, name."""
    if key not in fields:
        return
    value, mark, what = fields[key], fields.mark(key), f"`{key}` of the bond"
    if not isinstance(value, Items) or len(value) != 3:
        faults.add(
            mark.line,
            f"{what} must be [chain, residue number, atom name], got {quoted(value, mark)}",
        )
        return
    chain = known_chain(value[0], value.marks[0], what, chains, faults)
    number, name = whole(value[1]), value[2]
    if number is None:
        faults.add(
            mark.line,
            f"the second of {what} must be a residue number, got "
            f"{quoted(value[1], value.marks[1], numeric=True)}",
        )
    elif odd := disguised(value[1], value.marks[1]):
        faults.add(mark.line, f"the second of {what}: {odd}")
    if not isinstance(name, str):
        faults.add(
            mark.line,
            f"the third of {what} must be an atom's name, got {quoted(name, value.marks[2])}",
        )
        return
    if chain is None or number is None or not chain.residues:
        if chain is not None and chain.kind == "ligand" and number not in (None, 1):
            faults.add(mark.line, f"{what} is residue {number} of ligand {chain.id}, which has one")
        return
    if not 1 <= number <= len(chain.residues):
        faults.add(
            mark.line,
            f"{what} is residue {number} of chain {chain.id}, which has 1 to {len(chain.residues)}",
        )
        return
    residue = chain.residues[number - 1]
    atoms = const.ref_atoms.get(residue) if chain.kind != "ligand" and residue else None
    if atoms is not None and name not in atoms:
        faults.add(
            mark.line,
            f"{what}: residue {number} of chain {chain.id} ({residue}) has no atom {name}, "
            f"{or_nearest(name, atoms, 'atoms')}",
        )
