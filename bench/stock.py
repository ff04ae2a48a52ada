"""Stock Boltz in one process and in float32: `python -m bench.stock predict ...`.

On a CPU `boltz predict` runs Boltz-2 in bfloat16, which no float32 run can be compared with. This
runs Boltz's own command line with one change: Lightning's Trainer gets precision 32. With `--peak
FILE` in front it also writes this process's peak memory and time.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

KIB = 1024


def main(argv: list[str]) -> None:
    """Run Boltz's command line in float32.

    Args:
        argv: Boltz's arguments, with or without `--peak FILE` in front.
    """
    report = None
    if argv[:1] == ["--peak"]:
        report, argv = Path(argv[1]), argv[2:]
    start = time.perf_counter()
    import boltz.main

    boltz.main.Trainer = with_precision_32(boltz.main.Trainer)
    boltz.main.cli.main(argv, standalone_mode=False)
    if report is not None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
        elapsed = time.perf_counter() - start
        report.write_text(json.dumps({"peak_rss_bytes": [peak], "seconds": elapsed}))


def with_precision_32(trainer: type) -> Callable[..., object]:
    """Wrap Lightning's Trainer so that it gets precision 32 whatever Boltz asks for.

    Args:
        trainer: the class.

    Returns:
        What to call in its place.
    """

    def build(*args: object, **kwargs: object) -> object:
        return trainer(*args, **{**kwargs, "precision": 32})

    return build


if __name__ == "__main__":
    main(sys.argv[1:])
