"""What the demo says: small tables, and in one line what differs."""

from __future__ import annotations

from foldcp.cli.compare import TOLERANCES, Comparison

NAMES = {"coords": "atom positions", "plddt": "pLDDT", "pae": "PAE", "pde": "PDE", "ptm": "pTM",
         "iptm": "ipTM"}  # fmt: skip
UNITS = {"A": " Å", "": ""}
FIRST, COLUMN = 29, 17  # characters


def line(name: str, *cells: str) -> str:
    """Return a line of a table: what it is about, and its cells under each other."""
    return f"   {name:<{FIRST}}{''.join(f'{cell:>{COLUMN}}' for cell in cells)}".rstrip()


def gigabytes(count: float, digits: int = 2) -> str:
    """Return bytes as one reads them."""
    return f"{count / 1e9:,.{digits}f} GB"


def seconds(count: float) -> str:
    """Return a time as one reads it."""
    return f"{count:.1f} s"


def distance(count: float) -> str:
    """Return a distance as one reads it; files of structures end at some decimal."""
    return f"{count:.2g} Å" if not count < 1e-4 else "below 0.0001 Å"


def how_alike(found: Comparison) -> str:
    """Return in one line how close two predictions are, and what counts as the same."""
    allowed = TOLERANCES["coords"].largest
    furthest = next(x.largest for x in found.differences if x.output == "coords")
    return (
        f"   RMSD {distance(found.rmsd)} over {found.atoms:,} atoms; largest shift of an atom "
        f"{distance(furthest)} ({allowed:g} Å allowed)"
    )


def apart(found: Comparison) -> list[str]:
    """Return what is not the same in two predictions that began with one seed; empty: all is."""
    said = [
        f"{NAMES.get(x.output, x.output)} differ by up to {x.largest:.2g}"
        f"{UNITS[x.tolerance.unit]} ({x.tolerance.largest:g} allowed) and by "
        f"{x.mean:.2g} in the mean ({x.tolerance.mean:g} allowed)"
        for x in found.differences
        if not x.passed
    ]
    # One seed gives one frame: they agree as they are written, too.
    if not said and not found.as_written <= TOLERANCES["coords"].largest:
        said = [f"one structure is turned or shifted against the other by "
                f"{distance(found.as_written)}"]  # fmt: skip
    return said
