"""Collect what is wrong in a document, and word it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from foldcp.boltz.document.reading import Fields, Items, Mark

MOST = 6  # mistakes that one message tells


@dataclass
class Faults:
    """Mistakes, and notes on what Boltz ignores, each with its line."""

    found: list[tuple[int, str]] = field(default_factory=list)
    notes: list[tuple[int, str]] = field(default_factory=list)

    def add(self, line: int, text: str) -> None:
        """Note a mistake."""
        if (line, text) not in self.found:
            self.found.append((line, text))

    def note(self, line: int, text: str) -> None:
        """Note what the user may not have meant."""
        self.notes.append((line, text))

    def message(self) -> str:
        """All mistakes in the order of their lines."""
        told = [at(line, text) for line, text in sorted(self.found)[:MOST]]
        more = len(self.found) - len(told)
        return "; ".join([*told, *([f"and {more} more"] if more > 0 else [])])

    def text(self, fields: Fields, key: str, where: str, example: str) -> str | None:
        """A field that must be text and not empty; None, and a fault, if it is not."""
        value, mark = fields.get(key), fields.mark(key)
        if key not in fields:
            self.add(mark.line, f"{where} has no `{key}`: add `{key}: {example}`")
        elif not isinstance(value, str):
            self.add(mark.line, f"`{key}` of {where} must be text, got {told(value, mark)}")
        elif not value:
            self.add(mark.line, f"`{key}` of {where} is empty")
        else:
            return value
        return None

    def entries(self, fields: Fields, key: str, example: str) -> Items:
        """A field that is a list, each entry with a dash; Boltz takes an absent one as empty."""
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
                f"`{key}` must be a list, got {told(value, mark)}: begin each entry with a dash, "
                f"such as `- {example}`",
            )
        return Items()

    def truth(self, fields: Fields, key: str, where: str) -> bool:
        """A field that is true or false. Boltz takes any text for true, "false" too."""
        value, mark = fields.get(key, False), fields.mark(key)
        if isinstance(value, str) and value:
            self.add(
                mark.line, f"`{key}` of {where} must be true or false, got {told(value, mark)}"
            )
        return bool(value)

    def number(self, fields: Fields, key: str, where: str) -> float | None:
        """A field that is a distance in angstrom, None if it is absent or wrong."""
        if key not in fields:
            return None
        value, mark = fields[key], fields.mark(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            self.add(
                mark.line,
                f"`{key}` of {where} must be a number of angstroms above 0, got "
                f"{told(value, mark)}",
            )
            return None
        return float(value)

    def keys(self, fields: Fields, allowed: Sequence[str], where: str) -> None:
        """Refuse fields that are given twice or misspelt, and note those that Boltz ignores."""
        for key, line, first in fields.twice:
            self.add(line, f"`{key}` of {where} is given twice, first on line {first}: keep one")
        for key in fields:
            if key in allowed:
                continue
            line = fields.mark(key).line
            near = nearest(str(key), [name for name in allowed if name not in fields])
            if near:
                self.add(line, f"{where} has no field `{key}`: did you mean `{near}`?")
            else:
                self.note(line, f"`{key}` of {where} is no field of Boltz and is ignored")


def at(line: int, text: str) -> str:
    """A mistake with its line, if that is known."""
    return f"line {line}: {text}" if line else text


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The one of `known` that `word` is most likely a misspelling of, or None."""
    by_lower = {name.lower(): name for name in reversed(list(known))}
    close = difflib.get_close_matches(word.lower(), by_lower, 1, 0.75)
    return by_lower[close[0]] if close else None


def or_nearest(word: Any, known: Iterable[str], what: str) -> str:
    """What there is instead of `word`: the nearest, or all if they are few."""
    known = list(known)
    near = nearest(str(word), known)
    if near:
        return f"did you mean {near}?"
    some = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f"{what}: {some}" if known else f"there are no {what}"


def told(value: Any, mark: Mark) -> str:
    """A value in the user's words, with what YAML made of it."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        word = "true" if value else "false"
        if mark.text is None or mark.text.lower() == word:
            return word
        return f"{mark.text}, which YAML reads as {word} (put it in quotes)"
    if isinstance(value, (int, float)):
        return f"the number {mark.text or value} (put it in quotes if it is a name)"
    if isinstance(value, str):
        return f"'{value[:40]}'"
    if isinstance(value, list):
        return f"a list {value!r}" if len(repr(value)) < 40 else "a list"
    if isinstance(value, dict):
        return "a mapping"
    return f"{mark.text or value}, which YAML reads as a date (put it in quotes)"


def whole(value: Any) -> int | None:
    """A whole number, also one written as 2.0, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return int(value) if value == value and abs(value) < 1e9 and value == int(value) else None
