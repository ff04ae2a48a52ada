"""Collect what is wrong in a document, and word it."""

from __future__ import annotations

import difflib
import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foldcp.boltz.document.reading import Fields, Items, Mark, Odd
from foldcp.runtime.files.names import kind

MOST = 6  # mistakes that one message tells
_DASHES = ("-", "\u2010", "\u2011", "\u2012", "\u2013", "\u2014", "\u2022", "\u2212")


@dataclass
class Faults:
    """Mistakes, and notes on what Boltz ignores, each with its line."""

    found: list[tuple[int, str]] = field(default_factory=list)
    notes: list[tuple[int, str]] = field(default_factory=list)

    def add(self, line: int, text: str) -> None:
        """Note a mistake.

        Args:
            line: where it stands; 0: not known.
            text: what is wrong, and what to do.
        """
        if (line, text) not in self.found:
            self.found.append((line, text))

    def note(self, line: int, text: str) -> None:
        """Note what the user may not have meant.

        Args:
            line: where it stands; 0: not known.
            text: what Boltz makes of it.
        """
        self.notes.append((line, visible(text)))

    def message(self) -> str:
        """List all mistakes in the order of their lines."""
        quoted = [at(line, visible(text)) for line, text in sorted(self.found)[:MOST]]
        more = len(self.found) - len(quoted)
        return "; ".join([*quoted, *([f"and {more} more"] if more > 0 else [])])

    def text(self, fields: Fields, key: str, where: str, example: str) -> str | None:
        """Return a field that must be text and not empty; None, and a fault, if it is not.

        Args:
            fields: the mapping.
            key: name of the field.
            where: the mapping's name in messages.
            example: a value, for the message.
        """
        value, mark = fields.get(key), fields.mark(key)
        if key not in fields:
            self.add(mark.line, f"{where} has no `{key}`: add `{key}: {example}`")
        elif not isinstance(value, str):
            self.add(mark.line, f"`{key}` of {where} must be text, got {quoted(value, mark)}")
        elif not value:
            self.add(mark.line, f"`{key}` of {where} is empty")
        else:
            return value
        return None

    def entries(self, fields: Fields, key: str, example: str) -> Items:
        """Return a field that is a list with a dash per entry; absent ones count as empty.

        Args:
            fields: the mapping.
            key: name of the field.
            example: an entry, for the message.
        """
        if key not in fields:
            return Items()
        value, mark = fields[key], fields.mark(key)
        if isinstance(value, Items):
            return value
        if value is None:
            self.add(mark.line, f"`{key}:` is empty: list its entries below, or remove the line")
        elif value != {} and value != "":
            self.add(
                mark.line,
                f"`{key}` must be a list, got {quoted(value, mark)}: begin each entry with a dash, "
                f"such as `- {example}`",
            )
        return Items()

    def truth(self, fields: Fields, key: str, where: str) -> bool:
        """Return a field that is true or false; Boltz takes any text for true, "false" too.

        Args:
            fields: the mapping.
            key: name of the field.
            where: the mapping's name in messages.
        """
        value, mark = fields.get(key, False), fields.mark(key)
        if not isinstance(value, (bool, type(None))) and value not in (0, 1, ""):
            self.add(
                mark.line, f"`{key}` of {where} must be true or false, got {quoted(value, mark)}"
            )
        return bool(value)

    def number(self, fields: Fields, key: str, where: str) -> float | None:
        """Return a field that is a distance in angstrom, None if it is absent or wrong.

        Args:
            fields: the mapping.
            key: name of the field.
            where: the mapping's name in messages.
        """
        if key not in fields:
            return None
        value, mark = fields[key], fields.mark(key)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value <= 1e30 and value != float("inf"):
            self.add(
                mark.line,
                f"`{key}` of {where} must be a number of angstroms above 0, got "
                f"{quoted(value, mark, numeric=True)}",
            )
            return None
        return float(value)

    def keys(self, fields: Fields, allowed: Sequence[str], where: str) -> None:
        """Refuse fields that are given twice or misspelt, and note those that Boltz ignores.

        Args:
            fields: the mapping.
            allowed: names of fields that Boltz reads.
            where: the mapping's name in messages.
        """
        for key, line, first in fields.twice:
            self.add(line, f"`{key}` of {where} is given twice, first on line {first}: keep one")
        for key in fields:
            if key in allowed:
                continue
            line = fields.mark(key).line
            name = spelt(key)
            near = nearest(name, [name for name in allowed if name not in fields])
            if near:
                self.add(line, f"{where} has no field `{name}`: did you mean `{near}`?")
            elif isinstance(key, str) and key.startswith(_DASHES):
                self.add(line, f"`{name}` begins no entry: it takes `-` and a space")
            else:
                self.note(line, f"`{name}` of {where} is not a field of Boltz and is ignored")


def at(line: int, text: str) -> str:
    """Put the line before a mistake, if it is known.

    Args:
        line: of the mistake; 0: not known.
        text: what is wrong.
    """
    return f"line {line}: {text}" if line else text


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Find the one of `known` that `word` is most likely a misspelling of, or None.

    Args:
        word: the user's word.
        known: words that are right.
    """
    by_lower = {name.lower(): name for name in reversed(list(known))}
    close = difflib.get_close_matches(word.lower(), by_lower, 1, 0.75)
    return by_lower[close[0]] if close else None


def or_nearest(word: Any, known: Iterable[str], what: str) -> str:
    """Suggest replacements for `word`: the nearest one, or all if they are few.

    Args:
        word: the user's word.
        known: words that are right.
        what: what the words are, plural.
    """
    known = list(known)
    near = nearest(str(word), known)
    if near:
        return f"did you mean {near}?"
    some = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f"{what}: {some}" if known else f"there are no {what}"


def quoted(value: Any, mark: Mark, numeric: bool = False) -> str:
    """Describe a value in the user's words, with what YAML made of it.

    Args:
        value: as YAML read it.
        mark: its line and spelling.
        numeric: it should be a number, not a name.
    """
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        word = spelt(value)
        if mark.text is None or mark.text.lower() == word:
            return word
        return f"{mark.text}, which YAML reads as {word} (put it in quotes)"
    if isinstance(value, (int, float)):
        written = shortened(mark.text or str(value))
        return f"the number {written}{'' if numeric else ' (put it in quotes if it is a name)'}"
    if isinstance(value, str):
        return f"'{shortened(value)}'{' in quotes' * (numeric and value.isdigit())}"
    if isinstance(value, list):
        if len(value) > 8 or not all(isinstance(x, str) or whole(x) is not None for x in value):
            return "a list"
        return f"a list {value!r}" if len(repr(value)) < 40 else "a list"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, Odd):
        return str(value)
    return f"{mark.text or value}, which YAML reads as a date (put it in quotes)"


def spelt(key: Any) -> str:
    """Spell the name of a field, or what YAML made of it, as YAML does."""
    if key is None or isinstance(key, bool):
        return {None: "null", True: "true", False: "false"}[key]
    return "a number" if isinstance(key, int) and abs(key) > 1e40 else shortened(str(key))


def shortened(text: str, most: int = 40) -> str:
    """Shorten a long text to its start.

    Args:
        text: the text.
        most: characters of the result.
    """
    return text if len(text) <= most else f"{text[:most]}..."


def visible(text: str) -> str:
    """Make a text printable: characters that cannot be shown become their numbers."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def unusable(path: Path) -> str | None:
    """Return the reason why there is no file to read at a path, None if there is one."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return "not found"
    except OSError as error:
        return f"not found ({error.strerror})"
    return None if stat.S_ISREG(mode) else f"is {kind(mode)}, not a regular file"


def whole(value: Any) -> int | None:
    """Return a whole number, also one written as 2.0, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return int(value) if value == value and abs(value) < 1e9 and value == int(value) else None


def disguised(value: Any, mark: Mark) -> str:
    """Explain how YAML reads a number that people would read as another, such as 010; else "".

    Args:
        value: as YAML read it.
        mark: its line and spelling.
    """
    if not isinstance(value, int) or not re.match(r"[-+]?0\d|.*:", mark.text or ""):
        return ""
    sign = "`:`" if ":" in (mark.text or "") else "a leading 0"
    return f"{mark.text} is {value} to YAML: write it without {sign}"
