"""Files of the results folder are data: nothing in them is run.

Pickles can run anything when they are loaded. Checkpoints and the molecules of the cache are, and
are trusted, since the user named them (--cache, --checkpoint). A results folder may come from
someone else: of its pickles only molecules and plain arrays are loaded.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from boltz.data import types
from boltz.data.module import inferencev2
from rdkit.Chem import Mol

from foldcp.boltz.run import current

Kind = TypeVar("Kind")

_MOLECULE = {("rdkit.Chem.rdchem", "Mol")}
# An array of objects, which numpy makes of a field that is None.
_ARRAY = {("numpy", "ndarray"), ("numpy", "dtype")} | {
    (f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")
}


class Refused(ValueError):
    """A file holds something that this program did not write there."""

    def __init__(self, path: Any, what: str) -> None:
        super().__init__(
            f"{path} is not loaded: it holds {what}, which foldcp and Boltz do not write there; "
            "delete the folder `processed` of these results to have the inputs read again"
        )


class _Unpickler(pickle.Unpickler):
    """Finds no class and no function but those that are named."""

    def __init__(self, file: Any, path: Any, names: set[tuple[str, str]]) -> None:
        super().__init__(file)
        self._path, self._names = path, names

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._names:
            raise Refused(self._path, f"{module}.{name}")
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        raise Refused(self._path, "a reference to something outside")


def load_molecules(file: BinaryIO) -> dict[str, Mol]:
    """Molecules by name, from a pickle.

    Args:
        file: as `open(path, "rb")` returns it.

    Raises:
        Refused: it holds anything else.
    """
    found = _load(file, getattr(file, "name", "a pickle"), _MOLECULE)
    good = isinstance(found, dict) and all(
        isinstance(name, str) and isinstance(mol, Mol) for name, mol in found.items()
    )
    if not good:
        raise Refused(getattr(file, "name", "a pickle"), f"{type(found).__name__}")
    return found


def _load(file: Any, path: Any, names: set[tuple[str, str]]) -> Any:
    try:
        return _Unpickler(file, path, names).load()
    except Refused:
        raise
    except Exception as error:  # damaged data raises whatever it likes
        raise Refused(path, f"damaged data ({type(error).__name__}: {error})") from error


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Every array of an `.npz` file.

    Args:
        path: of the file.

    Raises:
        Refused: an array of objects holds anything but None.
    """
    found = {}
    with np.load(path, allow_pickle=False) as archive:
        for name in archive.files:
            try:
                found[name] = archive[name]
            except ValueError:
                found[name] = _objects(archive.zip.read(f"{name}.npy"), path)
    return found


def _objects(data: bytes, path: Path) -> np.ndarray:
    """An array of objects; all of them must be None."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else None
    if header is None or header(file)[2] != np.dtype(object):
        raise Refused(path, "an array of a kind that Boltz does not use")
    found = _load(file, path, _ARRAY)
    if not isinstance(found, np.ndarray) or any(x is not None for x in found.flat):
        raise Refused(path, "an array of objects")
    return found


class _Pickle:
    """Stands for the module `pickle` where Boltz reads molecules of the results folder."""

    def __getattr__(self, name: str) -> Any:
        return getattr(pickle, name)

    @staticmethod
    def load(file: BinaryIO) -> Any:
        return pickle.load(file) if current() is None else load_molecules(file)  # noqa: S301


def install() -> None:
    """Load what is in the results folder without running any of it, during a prediction."""
    stock = types.NumpySerializable.load.__func__

    def load(cls: type[Kind], path: Path) -> Kind:
        return stock(cls, path) if current() is None else cls(**load_arrays(path))

    types.NumpySerializable.load = classmethod(load)
    inferencev2.pickle = _Pickle()
