"""Downloads to the cache: on the root rank, whole or not at all, by one run at a time.

Stock writes to where later runs look, and takes what is there for complete. Here it writes to a
folder of its own inside the cache, which has links to what the cache has.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from types import ModuleType

from foldcp.boltz.run import current
from foldcp.errors import UserError
from foldcp.output.spool import sync_path
from foldcp.runtime.files.lock import Lock

_PARTIAL = ".foldcp_download"
# In the order in which stock makes them.
_FILES = {
    "download_boltz1": ("ccd.pkl", "boltz1_conf.ckpt"),
    "download_boltz2": ("mols.tar", "mols", "boltz2_conf.ckpt", "boltz2_aff.ckpt"),
}


def install(main: ModuleType) -> None:
    """Switch downloads over.

    Args:
        main: `boltz.main`.
    """
    for name, files in _FILES.items():
        setattr(main, name, _on_root(getattr(main, name), files))


def _on_root(stock: Callable[[Path], None], files: Sequence[str]) -> Callable[[Path], None]:
    stock = getattr(stock, "__wrapped__", stock)  # past Lightning's rank_zero_only

    @wraps(stock)
    def download(cache: Path) -> None:
        run = current()
        if run is None or run.session.is_root:
            try:
                complete(stock, cache, files)
            except Exception as error:
                raise UserError(
                    f"Boltz's weights and molecules are not complete in {cache} and downloading "
                    f"them failed ({error}): connect to the network, copy the files there, or "
                    "name the folder that has them with --cache or BOLTZ_CACHE"
                ) from error
        if run is not None:
            run.session.wait_for_root()

    return download


def complete(stock: Callable[[Path], None], cache: Path, files: Sequence[str]) -> None:
    """Download the files that a cache lacks, unless another run is doing just that.

    Args:
        stock: downloads to a folder what that lacks.
        cache: the folder.
        files: that it makes.

    Raises:
        Exception: what `stock` raises, or OSError. The cache then has only whole files.
    """
    if all((cache / name).exists() for name in files):
        return
    lock = Lock(cache)
    lock.take(wait=f"waiting for another run, which downloads Boltz's weights to {cache}")
    partial = cache / _PARTIAL
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir()
        there = [name for name in files if (cache / name).exists()]
        for name in there:
            (partial / name).symlink_to(Path("..") / name)
        if len(there) < len(files):
            stock(partial)
        for name in files:
            if name not in there:
                sync_path(partial / name)
                os.replace(partial / name, cache / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        lock.release()
