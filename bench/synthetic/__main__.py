"""Make a synthetic Boltz cache: `python -m bench.synthetic CACHE --size tiny`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from bench.synthetic import FILE_NAMES, make_cache
from foldcp.boltz.families.dry_run.arguments import SIZES


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and make the cache."""
    parser = argparse.ArgumentParser(prog="python -m bench.synthetic", description=__doc__)
    parser.add_argument("cache", type=Path, help="folder for `boltz predict --cache`")
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--only", nargs="+", choices=list(FILE_NAMES), default=list(FILE_NAMES))
    parser.add_argument("--ccd", nargs="*", default=[], metavar="CODE", help="needs biotite")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    start = time.perf_counter()
    make_cache(options.cache, options.size, options.only, options.seed, options.ccd)
    print(
        f"wrote an untrained {options.size} cache ({', '.join(options.only)}) to {options.cache} "
        f"in {time.perf_counter() - start:.1f} s"
    )


if __name__ == "__main__":
    main()
