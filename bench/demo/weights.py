"""Weights of the demo: Boltz's own where they are on this machine and fit, else untrained ones."""

from __future__ import annotations

import os
from pathlib import Path

from foldcp.fabric.memory import host_memory

GB = 1e9
# Stock Boltz holds the weights twice while it loads them. Ranks share one mapped copy of them and
# hold Python, torch and what they compute apart.
STOCK_BYTES, SHARED_BYTES, RANK_BYTES = 5 * GB, 2.1 * GB, 1.3 * GB
UNTRAINED = """\
Weights: untrained, made here, size {size}{why}.
The shape therefore means nothing; that both give the same one does."""
ABSENT = ". Boltz's own are not in {cache},\nwhere it puts them when it first runs"


def choose_cache(work: Path, size: str | None, ranks: int) -> tuple[Path, str]:
    """Choose the folder for Boltz's `--cache`, and make untrained weights where they are needed.

    Args:
        work: folder for the weights that are made.
        size: "tiny" or "real", of untrained weights; None: Boltz's own where they can be used.
        ranks: processes that will load the weights at the same time.

    Returns:
        The folder, and what was chosen and why in words.
    """
    own = Path(os.environ.get("BOLTZ_CACHE") or "~/.boltz").expanduser()
    needed, (free, _) = max(STOCK_BYTES, SHARED_BYTES + RANK_BYTES * ranks), host_memory()
    there = (own / "boltz2_conf.ckpt").exists()
    if size is None and there and free >= needed:
        return own, f"Weights: Boltz's own, from {own}."
    why = ""
    if size is None and there:
        why = (f". Boltz's own need about {needed / GB:.0f} GB of memory,\nand {free / GB:.0f} GB "
               'are free; with fewer processes: make demo DEMO="--nproc 2 --mesh 1x2"')  # fmt: skip
    elif not there:
        why = ABSENT.format(cache=own)
    size = size or "tiny"
    cache = work / f"cache-{size}"
    if size == "tiny" or not (cache / "boltz2_aff.ckpt").exists():  # which is written last
        from bench.synthetic import make_cache  # takes seconds to import, Boltz and RDKit

        make_cache(cache, size, ("boltz2",))
    return cache, UNTRAINED.format(why=why, size=size)
