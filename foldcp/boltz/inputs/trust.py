"""Files of the results folder are data: nothing in them is run.

Pickles can run anything when they are loaded. Checkpoints and the molecules of the cache are, and
are trusted, since the user named them (--cache, --checkpoint). A results folder may come from
someone else: of its pickles only molecules and plain arrays are loaded.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from boltz.data import mol, types
from boltz.data.feature import featurizerv2
from boltz.data.module import inference, inferencev2
from boltz.data.parse import mmcif, mmcif_with_constraints, schema
from rdkit.Chem import Mol

from foldcp.boltz.run import current
from foldcp.runtime.files.names import LONGEST, Unsafe, check, inside, open_regular, regular

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
    """Load molecules by name from a pickle.

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
    """Load every array of an `.npz` file.

    Args:
        path: of the file.

    Raises:
        Refused: an array of objects holds anything but None.
        Unsafe: it is no regular file, or a link that leads out of its folder.
    """
    found = {}
    with open_regular(inside(Path(path))) as file, np.load(file, allow_pickle=False) as archive:
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise Refused(path, "a single array")
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


def check_record(record: types.Record) -> types.Record:
    """Refuse a record with a name that would lead its files elsewhere.

    Raises:
        Unsafe: names it.
    """
    check(record.id, "the record's name", LONGEST)
    for chain in record.chains:
        if not isinstance(chain.msa_id, int):
            check(chain.msa_id, f"the MSA's name in record {record.id}")
    for template in record.templates or ():
        check(template.name, f"the template's name in record {record.id}")
    return record


def files(record: types.Record, folders: dict[str, Path | None]) -> list[Path]:
    """List the processed files of a record, which need not exist.

    Args:
        record: checked.
        folders: of structures, msa, constraints, templates and mols; None: there are none.
    """
    found = [("structures", f"{record.id}.npz"), ("constraints", f"{record.id}.npz")]
    found += [("msa", f"{c.msa_id}.npz") for c in record.chains if c.msa_id != -1]
    found += [("templates", f"{record.id}_{t.name}.npz") for t in record.templates or ()]
    found += [("mols", f"{record.id}.pkl")]
    return [folder / name for kind, name in found if (folder := folders.get(kind)) is not None]


def check_files(record: types.Record, folders: dict[str, Path | None]) -> None:
    """Refuse a record whose files are no regular files inside their folders.

    Args:
        record: names the files.
        folders: folder of each kind of file; None: there is none.

    Raises:
        Unsafe: names the file.
    """
    for path in files(check_record(record), folders):
        regular(inside(path))


def checked_input(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Boltz's reading of processed inputs: names and files are checked."""

    @wraps(stock)
    def load_input(
        record: types.Record,
        target_dir: Path,
        msa_dir: Path,
        constraints_dir: Path | None = None,
        template_dir: Path | None = None,
        extra_mols_dir: Path | None = None,
        affinity: bool = False,
    ) -> Any:
        options = {"template_dir": template_dir, "extra_mols_dir": extra_mols_dir}
        given = {name: folder for name, folder in options.items() if folder is not None}
        if affinity:
            given["affinity"] = affinity
        if current() is not None:
            folders = {"msa": msa_dir, "constraints": constraints_dir}
            folders |= {"templates": template_dir, "mols": extra_mols_dir}
            check_files(record, folders if affinity else {**folders, "structures": target_dir})
            if affinity:
                inside(target_dir / record.id)
        return stock(record, target_dir, msa_dir, constraints_dir, **given)

    return load_input


def checked_molecules(stock: Callable[..., dict[str, Mol]]) -> Callable[..., dict[str, Mol]]:
    """Wrap Boltz's reading of the cache's pickles: names stay in the cache.

    Names of residues come from inputs, templates and processed files. The cache is trusted, so
    that links in it are followed.
    """

    @wraps(stock)
    def load_molecules(moldir: Path, molecules: Iterable[str]) -> dict[str, Mol]:
        names = [check(name, "the residue's name") for name in molecules]
        for name in names:
            regular(Path(moldir) / f"{name}.pkl")
        return stock(moldir, names)

    return load_molecules


class _Pickle:
    """Stands for the module `pickle` where Boltz reads molecules of the results folder."""

    def __getattr__(self, name: str) -> Any:
        return getattr(pickle, name)

    @staticmethod
    def load(file: BinaryIO) -> Any:
        return pickle.load(file) if current() is None else load_molecules(file)  # noqa: S301


def only_in_training(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Stand in for properties of molecules, which a prediction does not use."""

    @wraps(stock)
    def get_symmetries(*args: Any, **options: Any) -> Any:
        if current() is not None:
            raise Refused("a molecule's property", "pickles")
        return stock(*args, **options)

    return get_symmetries


def install() -> None:
    """Load what is in the results folder without running any of it, during a prediction.

    Pickles of molecules are loaded from the cache alone, also outside of a prediction.
    """
    stock = types.NumpySerializable.load.__func__
    stock_json, stock_manifest = types.JSONSerializable.load.__func__, types.Manifest.load.__func__

    def load(cls: type[Kind], path: Path) -> Kind:
        return stock(cls, path) if current() is None else cls(**load_arrays(path))

    def load_json(cls: type[Kind], path: Path) -> Kind:
        if current() is None:
            return stock_json(cls, path)
        found = stock_json(cls, regular(inside(path)))
        if isinstance(found, types.Record) and check_record(found).id != path.stem:
            raise Unsafe(f"{path} is not used: it is of another record, {found.id}")
        return found

    def load_manifest(cls: type[Kind], path: Path) -> Kind:
        if current() is None:
            return stock_manifest(cls, path)
        found = stock_manifest(cls, regular(inside(path)))
        for record in found.records:
            check_record(record)
        return found

    types.NumpySerializable.load = classmethod(load)
    types.JSONSerializable.load = classmethod(load_json)
    types.Manifest.load = classmethod(load_manifest)
    inferencev2.pickle = _Pickle()
    inferencev2.load_input = checked_input(inferencev2.load_input)
    inference.load_input = checked_input(inference.load_input)
    featurizerv2.get_symmetries = only_in_training(featurizerv2.get_symmetries)
    guarded = checked_molecules(mol.load_molecules)
    for module in (mol, inferencev2, mmcif, mmcif_with_constraints, schema):
        module.load_molecules = guarded
