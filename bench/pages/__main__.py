"""Rewrite the generated parts of the documentation, or list those that are stale."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.machine import ROOT
from bench.pages import code, picture, results, seams

PICTURE = ROOT / "docs" / "images" / "tiles.svg"
BLOCKS: dict[str, Callable[[], str]] = {**code.BLOCKS, **results.BLOCKS, **seams.BLOCKS}
_BLOCK = re.compile(r"(<!-- block ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def pages() -> list[Path]:
    """List the pages that may hold generated blocks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str) -> str:
    """Replace the blocks of a page by what their functions return now.

    Args:
        text: of the page.

    Returns:
        The page as it should be.

    Raises:
        ValueError: a block has a name that no function has.
    """

    def fill(found: re.Match[str]) -> str:
        begin, name, end = found.groups()
        if name not in BLOCKS:
            raise ValueError(f"there is no block {name!r}: use one of {', '.join(sorted(BLOCKS))}")
        return f"{begin}\n{BLOCKS[name]()}\n\n{end}"

    return _BLOCK.sub(fill, text)


def stale() -> Iterator[tuple[Path, str]]:
    """Yield each generated file that differs from what it should be, with its right text."""
    texts = {PICTURE: picture.svg()}
    texts |= {page: filled(page.read_text()) for page in pages()}
    for path, text in texts.items():
        if not path.is_file() or path.read_text() != text:
            yield path, text


def main(argv: list[str] | None = None) -> int:
    """Rewrite or check the pages.

    Args:
        argv: arguments; those of the process when None.

    Returns:
        1 when `--check` found a stale file, else 0.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.pages")
    parser.add_argument("--check", action="store_true", help="list stale files, change nothing")
    check = parser.parse_args(argv).check
    found = list(stale())
    for path, text in found:
        print(f"{path.relative_to(ROOT)} {'is stale' if check else 'rewritten'}")
        if not check:
            path.write_text(text)
    if check and found:
        print("run: python -m bench.pages")
    return 1 if check and found else 0


if __name__ == "__main__":
    sys.exit(main())
