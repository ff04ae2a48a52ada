"""Read YAML and FASTA inputs into plain values that remember their lines."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from foldcp.boltz.document.codes import CodeLoader

_INDENT = "indent with spaces, YAML allows no tabs"
_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
_MEANS = {"int": "a number", "float": "a number", "bool": "true or false", "timestamp": "a date"}
_MOST = 1_000_000  # values that an input may hold, those of its aliases counted


class Malformed(Exception):
    """A file is no YAML or FASTA.

    Args:
        line: where; 0: not known.
        text: what is wrong.
    """

    def __init__(self, line: int, text: str) -> None:
        super().__init__(text)
        self.line, self.text = line, text


class Mark(NamedTuple):
    """The line of a value, and its spelling if it is not a list or mapping."""

    line: int
    text: str | None = None


class Fields(dict[Any, Any]):
    """A mapping with a mark per key; `twice` holds (key, line, first line) of repeated keys."""

    def __init__(self, line: int = 0) -> None:
        super().__init__()
        self.line = line
        self.marks: dict[Any, Mark] = {}
        self.twice: list[tuple[Any, int, int]] = []

    def put(self, key: Any, value: Any, mark: Mark) -> None:
        """Set a field and where it stands.

        Args:
            key: name of the field.
            value: its value.
            mark: the value's line and spelling.
        """
        self[key], self.marks[key] = value, mark

    def mark(self, key: Any) -> Mark:
        """Return the mark of a field, or of the mapping if it has no such field."""
        return self.marks.get(key, Mark(self.line))


class Items(list[Any]):
    """A list with a mark per item."""

    def __init__(self, line: int = 0) -> None:
        super().__init__()
        self.line = line
        self.marks: list[Mark] = []


class Odd:
    """A value with a tag that no field of Boltz takes, such as `!!set`."""

    def __init__(self, tag: str) -> None:
        self.tag = tag

    def __str__(self) -> str:
        return f"a value with the tag {self.tag}"


class _Loader(CodeLoader):
    """Boltz's YAML loader with marks, and with the line of an entry that has no value."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Construct the value of a node, see the class."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            line, kind = node.start_mark.line + 1, _MEANS.get(node.tag.removeprefix(_TAG))
            if not isinstance(node, yaml.ScalarNode) or kind is None:
                raise Malformed(line, "a value of this tag (`!!...`) cannot be read") from error
            text = f"{node.value[:40]}{'...' * (len(node.value) > 40)}"
            raise Malformed(
                line, f"{text} cannot be read as {kind}, which it is to YAML: put it in quotes"
            ) from error


def _mapping(loader: _Loader, node: yaml.MappingNode) -> Any:
    if not isinstance(node, yaml.MappingNode):
        raise TypeError(node.tag)
    fields = Fields(node.start_mark.line + 1)
    yield fields
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        if isinstance(key_node, yaml.ScalarNode) and key_node.tag != _MERGE:
            line = key_node.start_mark.line + 1
            if key_node.value in seen:
                fields.twice.append((key_node.value, line, seen[key_node.value]))
            seen[key_node.value] = line
    values = loader.construct_mapping(node)  # Boltz's own reading, merge keys included
    fields.update(values)
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        fields.marks[key] = _mark(value_node, key_node.start_mark.line + 1)


def _sequence(loader: _Loader, node: yaml.SequenceNode) -> Any:
    items = Items(node.start_mark.line + 1)
    yield items
    items.extend(loader.construct_sequence(node))
    items.marks = [_mark(n, n.start_mark.line + 1) for n in node.value]


def _mark(node: yaml.Node, line: int) -> Mark:
    return Mark(line, node.value if isinstance(node, yaml.ScalarNode) else None)


def _odd(loader: _Loader, node: yaml.Node) -> Odd:
    return Odd(f"!!{node.tag.removeprefix(_TAG)}")


_Loader.add_constructor(f"{_TAG}map", _mapping)
_Loader.add_constructor(f"{_TAG}seq", _sequence)
for _name in ("set", "omap", "pairs", "binary"):
    _Loader.add_constructor(f"{_TAG}{_name}", _odd)


def read_yaml(path: Path) -> Any:
    """Read a YAML file, its mappings as `Fields` and its lists as `Items`.

    Raises:
        Malformed: it is no YAML.
        OSError: it cannot be read.
    """
    text = _text(path)
    try:
        return _load(text)
    except yaml.MarkedYAMLError as error:
        raise _malformed(error, text) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise Malformed(line, "it holds a control character, which YAML does not allow") from error
    except RecursionError as error:
        raise Malformed(0, "it is nested too deeply") from error


def _load(text: str) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _count(node, {}) > _MOST:
            raise Malformed(0, f"its aliases (`*...`) stand for more than {_MOST:,} values")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Values of a node, those that aliases repeat counted again."""
    if id(node) not in known:
        known[id(node)] = 1  # where it holds itself
        below = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = [x for pair in below for x in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_count(part, known) for part in parts)
    return known[id(node)]


def _text(path: Path) -> str:
    try:
        with path.open("r") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise Malformed(
            _line_of(path, error.start), "it is not text in UTF-8: save it in that encoding"
        ) from error


def _line_of(path: Path, position: int) -> int:
    return path.read_bytes()[:position].count(b"\n") + 1


def _malformed(error: yaml.MarkedYAMLError, text: str) -> Malformed:
    problem = (error.problem or "it cannot be read").replace("<", "").replace(">", "")
    open_ended = problem.endswith(("end of stream", "'stream end'"))
    mark = error.problem_mark or error.context_mark
    if open_ended and error.context_mark:  # where it begins tells more
        mark = error.context_mark
    number = mark.line + 1 if mark is not None else 0
    lines = text.splitlines()
    line = lines[number - 1] if 0 < number <= len(lines) else ""
    if text.lstrip().startswith(">"):
        return Malformed(number, "it looks like FASTA: let its name end in .fasta")
    if "single document" in str(error.context or ""):
        return Malformed(number, "it holds several documents (`---`): give each a file of its own")
    if "could not determine a constructor for the tag" in problem:
        return Malformed(
            number,
            "a tag (`!...`, or a bare `=` or `<<`) unknown to Boltz: put the value in quotes",
        )
    if "'\\t'" in problem:
        return Malformed(number, f"a tab stands where YAML expects text: {_INDENT}")
    if "mapping values are not allowed" in problem:
        problem = (
            "`:` where YAML expects none: indent fields alike, put text with a colon in quotes"
        )
    if "unhashable" in problem:
        problem = "a key must be text, not a list or a mapping"
    if "second occurrence" in problem:
        problem = "an anchor (`&...`) is given twice"
    if open_ended and "quoted" in (error.context or ""):
        problem = "a quotation mark is not closed"
    if error.context and "flow" in error.context:
        problem += " (a bracket or brace is not closed)"
    hint = "; put a SMILES in single quotes" if re.search(r"\bsmiles\b", line) else ""
    return Malformed(number, f"it is no valid YAML: {problem}{hint}")


def read_fasta(path: Path) -> Fields:
    """Read a FASTA file into the document that Boltz makes of it.

    Raises:
        Malformed: a header is not of the form that Boltz reads.
        OSError: it cannot be read.
    """
    document, chains = Fields(1), Items(1)
    text = _text(path)
    if text.startswith("\ufeff"):
        raise Malformed(1, "it begins with a byte order mark: save it as UTF-8 without one")
    for line, title, sequence in _records(text):
        chains.append(_chain(line, title, sequence))
        chains.marks.append(Mark(line))
    if not chains:
        raise Malformed(
            0, "it holds no chain: a header such as `>A|protein|empty`, then its sequence"
        )
    document.put("sequences", chains, Mark(1))
    return document


def _records(text: str) -> list[tuple[int, str, str]]:
    """(line, header, sequence) of each record, as Biopython reads them."""
    found: list[tuple[int, str, list[str]]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.startswith(">"):
            found.append((number, line[1:].rstrip(), []))
        elif found:
            found[-1][2].append(line.rstrip())
    return [(n, title, "".join(s).replace(" ", "")) for n, title, s in found]


_KINDS = {"protein": "sequence", "dna": "sequence", "rna": "sequence"}


def _chain(line: int, title: str, sequence: str) -> Fields:
    form = "a header is `>CHAIN|KIND`, or `>CHAIN|protein|MSA` without spaces"
    word = title.split(None, 1)[0] if title else ""
    parts = word.split("|")
    if len(parts) < 2:
        raise Malformed(line, f"header `>{title}` has no `|`: {form}")
    name, kind = parts[0], parts[1].lower()
    if kind not in (*_KINDS, "ccd", "smiles"):
        near = difflib.get_close_matches(kind, [*_KINDS, "ccd", "smiles"], 1, 0.75)
        hint = f"did you mean {near[0]}?" if near else "protein, dna, rna, ccd or smiles"
        raise Malformed(line, f"`{parts[1]}` in header `>{title}` is no kind of chain: {hint}")
    fields, item = Fields(line), Fields(line)
    fields.put("id", name, Mark(line, name))
    fields.put(_KINDS.get(kind, kind), sequence, Mark(line + 1, sequence))
    if len(parts) == 3 and parts[2]:
        if kind != "protein":
            raise Malformed(line, f"header `>{title}` names an MSA, which only proteins have")
        fields.put("msa", parts[2], Mark(line, parts[2]))
    item.put(kind if kind in _KINDS else "ligand", fields, Mark(line))
    return item
