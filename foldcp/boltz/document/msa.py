"""Check `msa` of the proteins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foldcp.boltz.document.faults import Faults, quoted, shortened, unusable
from foldcp.boltz.document.reading import Fields, Items, Mark
from foldcp.boltz.document.setting import Chain, Setting

_READ = (".a3m", ".csv", ".a3m.gz", ".csv.gz")
# What HH-suite's reformat.pl calls the formats of alignments.
_CONVERT = {
    ".sto": "sto", ".stk": "sto", ".stockholm": "sto", ".a2m": "a2m", ".aln": "clu",
    ".clustal": "clu", ".clu": "clu", ".fasta": "fas", ".fa": "fas", ".afa": "fas", ".fas": "fas",
}  # fmt: skip


def check(document: Fields, chains: dict[str, Chain], faults: Faults, setting: Setting) -> None:
    """Check `msa` of the proteins.

    Args:
        document: the document.
        chains: chains by id.
        faults: collects what is wrong.
        setting: what the document is read for.
    """
    auto, custom = 0, 0
    first: dict[int, tuple[Any, int]] = {}
    items = document.get("sequences")
    for item in items if isinstance(items, Items) else ():
        fields = item.get("protein") if isinstance(item, Fields) else None
        if not isinstance(fields, Fields):
            continue
        ids = fields.get("id")
        name = next(
            (x for x in (ids if isinstance(ids, list) else [ids]) if isinstance(x, str)), ""
        )
        where, mark = f"protein {name}".rstrip(), fields.mark("msa")
        value = fields.get("msa")
        if isinstance(value, (list, dict)) or isinstance(value, bool) and value:
            faults.add(
                mark.line, f"`msa` of {where} must be a path or `empty`, got {quoted(value, mark)}"
            )
            continue
        value = 0 if value in (None, "") else -1 if value == "empty" else value
        entity = chains[name].entity if name in chains else -1
        if entity >= 0:
            other, line = first.setdefault(entity, (value, mark.line))
            if other != value:
                faults.add(
                    mark.line,
                    f"`msa` of {where} is another than that of the same sequence on line {line}: "
                    "give both the same",
                )
        if value == 0:
            auto = auto or mark.line
        elif value != -1:
            custom = custom or mark.line
            _alignment(value, mark, where, faults)
    if auto and custom:
        faults.add(
            auto,
            f"a protein without `msa` is asked of the server, but line {custom} names a file: "
            "Boltz cannot mix them; give each a file or `msa: empty`",
        )
    elif auto and not setting.server:
        hint = "a protein has no `msa`: add its path, or `msa: empty`"
        if setting.fasta:
            hint = "a protein has no MSA: end its header in its path, or as `>A|protein|empty`"
        faults.add(auto, f"{hint}, or pass --use_msa_server")


def _alignment(value: Any, mark: Mark, where: str, faults: Faults) -> None:
    if not isinstance(value, str):
        faults.add(
            mark.line, f"`msa` of {where} must be a path or `empty`, got {quoted(value, mark)}"
        )
        return
    path = Path(value)
    why = unusable(path)
    if why and why.startswith("not found"):
        hint = "correct its path in the input, which starts from the folder you are in"
        if value.lower() in ("empty", "none", "null", "no", "false", "single"):
            hint = "write `empty` for none"
        faults.add(mark.line, f"MSA file {shortened(value, 200)} of {where} {why}: {hint}")
    elif why:
        faults.add(
            mark.line, f"the MSA {value} of {where} cannot be used: it {why}; correct its path"
        )
    elif not path.name.lower().endswith(_READ):
        form = _CONVERT.get(path.suffix.lower())
        if form:
            hint = (
                f"convert it with `reformat.pl {form} a3m {path.name} {path.stem}.a3m` (HH-suite)"
            )
        else:
            hint = "convert it to a3m, for example with HH-suite's reformat.pl"
        faults.add(
            mark.line,
            f"the MSA {value} of {where} is not supported, only a3m or csv (also .gz): {hint}",
        )
