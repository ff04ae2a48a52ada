"""`foldcp report DIR`: make the page of a results folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from foldcp.output.report.writing import report


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page of a results folder and print where it is.

    Args:
        argv: arguments; those of the process when None.

    Returns:
        0.

    Raises:
        UserError: there is nothing to report on, or the page cannot be written.
    """
    parser = argparse.ArgumentParser(prog="foldcp report", description=__doc__)
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder boltz_results_...")
    parser.add_argument("--only", metavar="NAME", nargs="+", default=(), help="these inputs only")
    parser.add_argument("--out", metavar="FILE", type=Path, help="the page, another one")
    options = parser.parse_args(argv)
    print(f"foldcp: report: {report(options.folder, options.only, options.out)}")
    return 0
