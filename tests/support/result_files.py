"""Compare all files that two runs of `boltz predict` left, number by number."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

_NUMBER = re.compile(r"(?<![A-Za-z_])[-+]?(?:\d+\.\d+(?:e[-+]?\d+)?|nan|inf)\b", re.IGNORECASE)


def differences(ours: Path, theirs: Path) -> dict[str, float]:
    """Compare the folders of predictions of two runs.

    Args:
        ours: `boltz_results_*` folder of foldcp.
        theirs: `boltz_results_*` folder to compare with.

    Returns:
        The largest absolute difference of each file ("x/x_model_0.cif") or array of one
        ("x/pae_x_model_0.npz/pae"); infinity where only one side is not finite.

    Raises:
        AssertionError: files, texts between the numbers, arrays or shapes are not the same.
    """
    a, b = (_files(run / "predictions") for run in (ours, theirs))
    assert a.keys() == b.keys(), f"files that one run lacks: {sorted(a.keys() ^ b.keys())}"
    assert a, f"{ours} holds no predictions"
    found: dict[str, float] = {}
    for name in a:
        if name.endswith(".npz"):
            found |= _arrays(name, a[name], b[name])
        else:
            found[name] = _texts(name, a[name].read_text(), b[name].read_text())
    return found


def _files(folder: Path) -> dict[str, Path]:
    return {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}


def _texts(name: str, a: str, b: str) -> float:
    # Numbers are cut out, widths of columns with them.
    rest_a, rest_b = (re.sub(r"\s+", " ", _NUMBER.sub("#", text)) for text in (a, b))
    assert rest_a == rest_b, f"{name}: the text differs"
    values = [np.array([float(x) for x in _NUMBER.findall(text)]) for text in (a, b)]
    return _largest(name, *values)


def _arrays(name: str, a: Path, b: Path) -> dict[str, float]:
    with np.load(a, allow_pickle=True) as ours, np.load(b, allow_pickle=True) as theirs:
        assert ours.keys() == theirs.keys(), f"{name}: {ours.keys() ^ theirs.keys()}"
        return {f"{name}/{k}": _largest(f"{name}/{k}", ours[k], theirs[k]) for k in ours}


def _largest(name: str, a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape, f"{name}: {a.shape} and {b.shape}"
    if a.dtype.names:
        parts = [_largest(f"{name}/{field}", a[field], b[field]) for field in a.dtype.names]
        return max(parts, default=0.0)
    if a.dtype.kind not in "fiub":
        assert np.array_equal(a, b), f"{name} differs"
        return 0.0
    a, b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):
        gap = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    return float(np.nan_to_num(gap, nan=np.inf).max(initial=0.0))
