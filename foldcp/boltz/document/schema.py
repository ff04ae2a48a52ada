"""Check a whole document."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from foldcp.boltz.document import chains, constraints, msa, properties, templates
from foldcp.boltz.document.faults import Faults, quoted
from foldcp.boltz.document.reading import Fields, Malformed, Mark, read_fasta, read_yaml
from foldcp.boltz.document.setting import Setting

_TOP = ("version", "sequences", "constraints", "templates", "properties")
_FASTA = (".fa", ".fas", ".fasta")


def check(path: Path, setting: Setting) -> Faults:
    """Check an input before Boltz reads it.

    Args:
        path: of a YAML or FASTA file.
        setting: what it is read for.

    Returns:
        What is wrong in it, and what Boltz ignores. What Boltz reads as it is meant is never wrong.

    Raises:
        OSError: the file cannot be read.
    """
    faults = Faults()
    fasta = path.suffix.lower() in _FASTA
    try:
        document = read_fasta(path) if fasta else read_yaml(path)
    except Malformed as error:
        faults.add(error.line, error.text)
        return faults
    if not isinstance(document, Fields):
        has = (
            "it is empty"
            if document is None
            else f"it must have `sequences:`, got {quoted(document, Mark(0))}"
        )
        faults.add(0, f"{has}: begin with `sequences:` and list the chains below it")
        return faults
    setting = replace(setting, fasta=fasta)
    faults.keys(document, (*_TOP, *(("bonds",) if fasta else ())), "the input")
    if document.get("version", 1) != 1:
        mark = document.mark("version")
        faults.add(mark.line, f"`version` must be 1, got {quoted(document['version'], mark)}")
    known = chains.check(document, faults, setting)
    msa.check(document, known, faults, setting)
    constraints.check(document, known, faults, setting)
    templates.check(document, known, faults, setting)
    properties.check(document, known, faults, setting)
    return faults
