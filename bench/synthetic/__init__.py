"""Stand-ins that benches and tests share.

A synthetic Boltz cache of molecules and untrained checkpoints, made offline in seconds; a GPU and a
mesh of which only the shapes exist. Importing this needs no Boltz; making a cache does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

Size = Literal["tiny", "real"]
Kind = Literal["boltz2", "boltz2_affinity", "boltz1"]
FILE_NAMES: dict[str, str] = {
    "boltz2": "boltz2_conf.ckpt",
    "boltz2_affinity": "boltz2_aff.ckpt",
    "boltz1": "boltz1_conf.ckpt",
}


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
    from bench.synthetic.checkpoint import write_checkpoint
    from bench.synthetic.molecules import write_molecules

    cache = Path(cache)
    write_molecules(cache, ccd)
    for kind in kinds:
        write_checkpoint(cache / FILE_NAMES[kind], size, kind, seed, blocks)
    affinity = cache / FILE_NAMES["boltz2_affinity"]
    if "boltz2" in kinds and not affinity.exists():
        affinity.touch()
    return cache
