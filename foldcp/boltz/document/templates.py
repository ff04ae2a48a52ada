"""Check `templates`, as far as that needs no look into their files."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from foldcp.boltz.document.faults import Faults, or_nearest, quoted, shortened, unusable
from foldcp.boltz.document.reading import Fields, Items
from foldcp.boltz.document.setting import Chain, Setting

_FIELDS = ("cif", "pdb", "chain_id", "template_id", "force", "threshold")


def check(document: Fields, chains: dict[str, Chain], faults: Faults, setting: Setting) -> None:
    """Check `templates`, as far as that needs no look into their files.

    Args:
        document: the document.
        chains: chains by id.
        faults: collects what is wrong.
        setting: what the document is read for.
    """
    proteins = {name: chain for name, chain in chains.items() if chain.kind == "protein"}
    items = faults.entries(document, "templates", "cif: template.cif")
    if items and not setting.boltz2:
        faults.add(
            document.mark("templates").line,
            "Boltz-1 takes no templates: remove them, or use Boltz-2",
        )
        return
    seen: dict[str, tuple[Path, int]] = {}
    for item, mark in zip(items, items.marks, strict=True):
        if not isinstance(item, Fields):
            faults.add(
                mark.line,
                f"a template must be `cif:` or `pdb:` and a path, got {quoted(item, mark)}",
            )
            continue
        faults.keys(item, _FIELDS, "a template")
        _template_file(item, seen, faults)
        counts = _chains(item, proteins, faults)
        if len(counts) == 2 and counts[0] != counts[1]:
            faults.add(
                item.line, "`chain_id` and `template_id` of a template must name as many chains"
            )
        if not proteins and "chain_id" not in item:
            faults.add(item.line, "a template needs a protein, and the input has none")
        if faults.truth(item, "force", "a template") and "threshold" not in item:
            faults.add(item.line, "a template with `force` needs `threshold`, in angstroms")
        faults.number(item, "threshold", "a template")


def _chains(item: Fields, proteins: Collection[str], faults: Faults) -> list[int]:
    """Check the chains that a template names; returns how many each of its two fields names."""
    counts = []
    for key in ("chain_id", "template_id"):
        value, place = item.get(key), item.mark(key)
        if value is None:
            continue
        several = isinstance(value, Items)
        values = list(zip(value, value.marks, strict=True)) if several else [(value, place)]
        counts.append(len(values))
        if not values:
            faults.add(place.line, f"`{key}` of a template is an empty list: remove it")
        for name, at in values:
            if not isinstance(name, str):
                faults.add(
                    at.line, f"`{key}` of a template must be a chain's id, got {quoted(name, at)}"
                )
            elif key == "chain_id" and name not in proteins:
                faults.add(
                    at.line,
                    f"`chain_id` of a template is {name}, which is no protein of the input: "
                    f"{or_nearest(name, proteins, 'proteins')}",
                )
    return counts


def _template_file(item: Fields, seen: dict[str, tuple[Path, int]], faults: Faults) -> None:
    given = [key for key in ("cif", "pdb") if key in item]
    if len(given) != 1:
        has = "both `cif` and `pdb`: keep one" if given else "neither `cif` nor `pdb`: add its path"
        faults.add(item.line, f"a template has {has}")
        return
    (key,) = given
    text = faults.text(item, key, "a template", f"template.{key}")
    if text is None:
        return
    path, line = Path(text), item.mark(key).line
    if why := unusable(path):
        faults.add(
            line,
            f"template {shortened(text, 200)} {why}: correct its path, which starts from the "
            "folder you are in",
        )
    other, first = seen.setdefault(path.stem, (path, line))
    if other != path:
        faults.add(
            line,
            f"template {text} has the name of the one on line {first}, and Boltz would keep one of "
            "them: rename one",
        )
