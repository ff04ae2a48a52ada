"""A synthetic Boltz cache: molecules and untrained checkpoints, made offline in seconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.synthetic.checkpoint import FILE_NAMES, Kind, Size, write_checkpoint
from bench.synthetic.molecules import write_molecules


def make_cache(
    cache: str | Path,
    size: Size = "tiny",
    kinds: Sequence[Kind] = ("boltz2",),
    seed: int = 0,
    ccd: Iterable[str] = (),
    blocks: int | None = None,
) -> Path:
    """Write molecules and checkpoints, so that `boltz predict --cache` needs no network.

    Args:
        cache: folder to fill; made if absent.
        size: "tiny" or "real".
        kinds: checkpoints to write. Boltz-2 looks for its affinity checkpoint even when it is
            not used, so one that is left out is stood in for by an empty file.
        seed: seed of the weights.
        ccd: further component codes, see `write_molecules`.
        blocks: of the trunks, see `write_checkpoint`.
    Returns:
        The folder.
    """
    cache = Path(cache)
    write_molecules(cache, ccd)
    for kind in kinds:
        write_checkpoint(cache / FILE_NAMES[kind], size, kind, seed, blocks)
    affinity = cache / FILE_NAMES["boltz2_affinity"]
    if "boltz2" in kinds and not affinity.exists():
        affinity.touch()
    return cache
