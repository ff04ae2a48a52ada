"""The output of one process: a line that is rewritten on a terminal, plain lines in a file.

What is printed past it, by Boltz and packages that it uses, goes through `Screened`: whole lines,
of which known noise is left out, and all of which `foldcp.log` keeps.
"""

from __future__ import annotations

import os
import re
import shutil
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

_EVERY = 0.2, 30.0  # seconds between two states of one stage: on a terminal, in a file
_BAR, _LEAST = 20, 5  # characters of a bar, at most and at least
_CLEAR = "\r\x1b[K"

# What Boltz says, and foldcp says better or not at all.
_NOISE = re.compile(
    r"Running on CPU, this will be slow|Checking input data|Processing \d+ inputs? with"
    r"|Found \d+ existing processed inputs|All inputs are already processed"
    r"|Found some existing|Found \d+ existing predictions|Found existing affinity"
    r"|Running (structure|affinity) prediction for|Predicting property: affinity"
    r"|Number of failed examples|Found explicit empty MSA"
    r"|(Featurizer|Tokenizer|Cropper) failed on|Molecule loading failed|Failed to load input"
)


class Log:
    """`foldcp.log`: everything that was said, whoever said it, added to what is there.

    Args:
        path: of the file; None keeps nothing. So does a disk that cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self._file = -1
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
        if path is not None:
            try:
                self._file = os.open(path, flags | os.O_CLOEXEC, 0o644)
            except OSError:
                return

    def write(self, line: str) -> None:
        """Add a line."""
        if self._file >= 0:
            try:
                os.write(self._file, f"{line}\n".encode(errors="replace"))
            except OSError:  # full: what matters is on the screen
                return

    def close(self) -> None:
        """Write no more."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class Console:
    """The user's view of a run.

    Args:
        stream: where to; usually `sys.stderr`.
        log: gets every line, too.
    """

    def __init__(self, stream: Any, log: Log) -> None:
        self._stream, self.log = stream, log
        self.is_terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._drawn, self._at = "", 0.0

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self.clear()
        put(self._stream, f"{line}\n")
        self.log.write(line)

    def show(self, what: str, fraction: float | None, left: str, fresh: bool) -> None:
        """Show how far the work is, in place of what was shown before.

        Args:
            what: is being done.
            fraction: of it that is done, None where that means nothing.
            left: the time that it may still take, "" where that is not known.
            fresh: it has just begun. Otherwise it is shown from time to time.
        """
        now = time.monotonic()
        if not fresh and now - self._at < _EVERY[not self.is_terminal]:
            return
        self._at = now
        percent = "" if fraction is None else f"{100 * fraction:.0f} %"
        plain = ", ".join(part for part in (what, percent, left) if part)
        if not self.is_terminal:
            self.say(f"foldcp: {plain}")
            return
        width = shutil.get_terminal_size().columns - 1 - len("foldcp: ")
        rest = ", ".join(part for part in (percent, left) if part)
        what = _fitted(what, width - len(rest and f", {rest}"))
        bar = "" if fraction is None else _bar(fraction, width - _cells(what) - len(rest) - 2)
        plain = f"{what} {bar} {rest}" if bar else ", ".join(part for part in (what, rest) if part)
        self._drawn = f"foldcp: {_cut(plain, width)}"
        put(self._stream, _CLEAR + self._drawn)

    def clear(self) -> None:
        """Take away what `show` left on a terminal."""
        if self._drawn:
            put(self._stream, _CLEAR)
            self._drawn = ""

    def again(self) -> None:
        """Treat the next `show` as fresh."""
        self._at = float("-inf")


def _bar(fraction: float, room: int) -> str:
    """A bar of at most `room` characters; "" where that is too few."""
    length = min(_BAR, room)
    full = round(length * min(1.0, max(0.0, fraction)))
    return f"[{'#' * full}{'.' * (length - full)}]" if length >= _LEAST else ""


def _cells(text: str) -> int:
    """Columns that a text takes on a terminal."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def _cut(text: str, room: int) -> str:
    """The beginning of a text, as far as it fits."""
    while _cells(text) > max(0, room):
        text = text[:-1]
    return text


def _fitted(what: str, room: int) -> str:
    """Shorten or drop the input's name before the stage, where both are too long."""
    name, _, stage = what.rpartition(": ")
    if not name or _cells(what) <= room:
        return what
    left = room - _cells(f"...: {stage}")
    return f"{_cut(name, left)}...: {stage}" if left > 0 else stage


class Screened:
    """A standard stream whose lines are screened on their way.

    Args:
        stream: the stream.
        console: is cleared before anything is shown.
        shown: decides whether a line is.
    """

    def __init__(self, stream: Any, console: Console, shown: Callable[[str], bool]) -> None:
        self.stream, self._console, self._shown = stream, console, shown
        self._held, self._open = "", False

    def write(self, text: str) -> int:
        """Write whole lines; what follows the last one waits for its end, or for `flush`."""
        *lines, self._held = (self._held + text).split("\n")
        for line in lines:
            self._pass(line, "\n")
        return len(text)

    def flush(self) -> None:
        """Write what waits."""
        if self._held:
            held, self._held = self._held, ""
            self._pass(held, "")

    def _pass(self, line: str, end: str) -> None:
        if line.strip() and end:
            self._console.log.write(line.rpartition("\r")[2])
        if self._open or self._shown(line):
            self._console.clear()
            put(self.stream, line + end)
            self._open = not end

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def put(stream: Any, text: str) -> None:
    """Write at once; where nobody reads any more, as after `| head`, a prediction goes on.

    Args:
        stream: of this process.
        text: for it.
    """
    try:
        try:
            stream.write(text)
        except UnicodeEncodeError:  # of a program that has made its output so
            stream.write(text.encode("ascii", "backslashreplace").decode())
        stream.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def is_news(line: str) -> bool:
    """Tell whether a line has news, not only what foldcp says itself."""
    return bool(line.strip()) and not _NOISE.match(line.strip())
