"""Read what a report shows of a prediction; what is missing or cannot be read is left out."""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from foldcp.errors import UserError
from foldcp.output.report import matrix
from foldcp.output.results import Chain, chains, structure_of
from foldcp.runtime.files.names import open_regular

Found = TypeVar("Found")

PIXELS = 320  # of an image, at most
_LARGEST_JSON = 1 << 26  # bytes
_UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile,
    zlib.error,
)  # fmt: skip


@dataclass
class Prediction:
    """Hold what is shown of one input.

    Args:
        name: of the input.
        files: of its folder, sorted.
        scores: of each sample by its rank, as its confidence file has them.
        affinity: as its file has them.
        chains: of the best sample, in the order of tokens; empty where their tokens do not add up.
        plddt: [N] of the best sample.
        pae: [n, n] of the best sample, angstrom, at most `PIXELS` rows.
        tokens: N, 0: not known.
        iptm: [chains, chains] of the best sample, NaN where there is none.
        faults: files that cannot be read and why.
    """

    name: str
    files: list[Path] = field(default_factory=list)
    scores: dict[int, dict[str, Any]] = field(default_factory=dict)
    affinity: dict[str, Any] = field(default_factory=dict)
    chains: list[Chain] = field(default_factory=list)
    plddt: NDArray[Any] | None = None
    pae: NDArray[Any] | None = None
    tokens: int = 0
    iptm: NDArray[Any] | None = None
    faults: list[str] = field(default_factory=list)


def read_scores(folder: Path) -> Prediction:
    """List the files of a prediction and read its scores.

    Args:
        folder: of the prediction, named after its input.
    """
    found = Prediction(folder.name)
    found.files = sorted(path for path in folder.iterdir() if path.is_file())
    pattern = re.compile(rf"confidence_{re.escape(folder.name)}_model_(\d+)\.json")
    for path in found.files:
        if match := pattern.fullmatch(path.name):
            found.scores[int(match[1])] = _attempt(found, path, read_json) or {}
        elif path.name == f"affinity_{folder.name}.json":
            found.affinity = _attempt(found, path, read_json) or {}
    found.scores = dict(sorted(found.scores.items()))
    return found


def read_best(folder: Path) -> Prediction:
    """Read what there is of a prediction's best sample, and the scores of all.

    Args:
        folder: of the prediction.
    """
    found, name = read_scores(folder), f"{folder.name}_model_0"
    structure = structure_of(folder)
    if structure is not None:
        found.chains = _attempt(found, structure, chains) or []
    paths = {path.name: path for path in found.files}
    if path := paths.get(f"plddt_{name}.npz"):
        found.plddt = _attempt(found, path, _plddt)
    if path := paths.get(f"pae_{name}.npz"):
        read = _attempt(found, path, lambda p: matrix.reduced(p, "pae", PIXELS))
        found.pae, found.tokens = read or (None, 0)
    if found.plddt is not None:
        if found.pae is not None and found.tokens != len(found.plddt):
            found.faults.append(f"pLDDT has {len(found.plddt)} tokens and PAE {found.tokens}")
        found.tokens = found.tokens or len(found.plddt)
    found.iptm = _matrix(found.scores.get(0, {}).get("pair_chains_iptm"))
    if found.tokens and sum(chain.tokens for chain in found.chains) != found.tokens:
        found.chains = []
    return found


def _attempt(found: Prediction, path: Path, read: Callable[[Path], Found]) -> Found | None:
    try:
        return read(path)
    except UserError as error:
        found.faults.append(str(error))
    except _UNREADABLE as error:
        found.faults.append(f"{path.name} cannot be read ({error or type(error).__name__})")
    return None


def read_json(path: Path) -> dict[str, Any]:
    """Read an object from a file.

    Args:
        path: of the file.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds something else, or is too large to be one of Boltz's or ours.
    """
    with open_regular(path) as file:
        text = file.read(_LARGEST_JSON + 1)
    if len(text) > _LARGEST_JSON:
        raise ValueError(f"it has more than {_LARGEST_JSON >> 20} MiB")
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    return value


def _plddt(path: Path) -> NDArray[Any]:
    with open_regular(path) as file, np.load(file, allow_pickle=False) as archive:
        values = archive["plddt"].squeeze()
    if values.ndim != 1 or values.dtype.kind not in "fiu" or not len(values):
        raise ValueError(f"pLDDT has shape {values.shape}; expected N numbers")
    return np.asarray(values, np.float64)


def _matrix(pairs: Any) -> NDArray[Any] | None:
    """Make a matrix of `pair_chains_iptm`, whose keys are positions of chains."""
    if not isinstance(pairs, dict) or not all(isinstance(row, dict) for row in pairs.values()):
        return None
    keys = sorted((key for key in pairs if key.isdecimal()), key=int)
    out = np.full((len(keys), len(keys)), np.nan)
    for i, row in enumerate(keys):
        for j, column in enumerate(keys):
            value = pairs[row].get(column)
            if isinstance(value, int | float):
                out[i, j] = value
    return out if np.isfinite(out).any() else None
