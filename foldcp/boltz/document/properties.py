"""Check `properties`: the affinity of a ligand."""

from __future__ import annotations

from typing import Any

from foldcp.boltz.document.chains import open_entry
from foldcp.boltz.document.constraints import known_chain, needs
from foldcp.boltz.document.faults import Faults, nearest, or_nearest, shortened
from foldcp.boltz.document.reading import Fields, Mark
from foldcp.boltz.document.setting import Chain, Setting


def check(document: Fields, chains: dict[str, Chain], faults: Faults, setting: Setting) -> None:
    """Check `properties`.

    Args:
        document: the document.
        chains: chains by id.
        faults: collects what is wrong.
        setting: what the document is read for.
    """
    items = faults.entries(document, "properties", "affinity: {binder: B}")
    if items and not setting.boltz2:
        faults.add(
            document.mark("properties").line,
            "Boltz-1 predicts no affinity: remove `properties`, or use Boltz-2",
        )
        return
    binders: dict[str, int] = {}
    for item, mark in zip(items, items.marks, strict=True):
        if isinstance(item, Fields) and item and _ignored(next(iter(item)), mark, faults):
            continue
        opened = open_entry(item, mark, ("affinity",), "an entry of `properties`", faults)
        if opened is None:
            continue
        fields = opened[1]
        needs(fields, ("binder",), ("binder",), "the affinity", faults)
        if "binder" not in fields:
            continue
        place = fields.mark("binder")
        chain = known_chain(fields["binder"], place, "`binder` of the affinity", chains, faults)
        if chain is None:
            continue
        binders.setdefault(chain.id, place.line)
        copies = sum(c.entity == chain.entity for c in chains.values())
        if chain.kind != "ligand":
            ligands = [c.id for c in chains.values() if c.kind == "ligand"]
            faults.add(
                place.line,
                f"`binder` of the affinity is {chain.kind} {chain.id}, but must be a ligand: "
                f"{or_nearest('', ligands, 'ligands')}",
            )
        elif copies > 1 and chain.entity >= 0:
            faults.add(
                place.line,
                f"`binder` of the affinity, {chain.id}, is one of {copies} copies of its ligand, "
                "and Boltz takes a single one",
            )
        elif len(chain.residues) > 1:
            faults.add(
                place.line,
                f"`binder` of the affinity, {chain.id}, has {len(chain.residues)} residues, and "
                "Boltz takes a ligand of one",
            )
    if len(binders) > 1:
        faults.add(
            max(binders.values()),
            f"Boltz predicts the affinity of one ligand, got {' and '.join(binders)}: put the "
            "others in inputs of their own",
        )


def _ignored(kind: Any, mark: Mark, faults: Faults) -> bool:
    """True for a property that is not Boltz's, nor a misspelt one."""
    if kind == "affinity" or not isinstance(kind, str) or nearest(kind, ["affinity"]):
        return False
    name = shortened(kind)
    faults.note(mark.line, f"property `{name}` is not one of Boltz (affinity) and is ignored")
    return True
