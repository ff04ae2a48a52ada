"""Sum up a run at its end: what was folded and how good it is, what it took, where it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foldcp.runtime.files.names import Unsafe, open_regular
from foldcp.runtime.screen.progress import clock

_SHOWN = 20  # inputs that are listed; foldcp.log has all
_SCORES = {  # file of a prediction -> what is shown of it, and its name there
    "confidence_{}_model_0.json": {
        "confidence": "confidence_score", "pLDDT": "complex_plddt", "pTM": "ptm", "ipTM": "iptm",
    },
    "affinity_{}.json": {
        "affinity": "affinity_pred_value", "binder": "affinity_probability_binary",
    },
}  # fmt: skip


def lines(
    folder: Path,
    folded: Sequence[str],
    scored: Sequence[str],
    skipped: int,
    failed: int,
    costs: dict[str, Any],
) -> list[str]:
    """Return the summary, line by line.

    Args:
        folder: of the results.
        folded: inputs that this run has folded.
        scored: those that it has predicted an affinity of.
        skipped: predictions that were there before.
        failed: inputs without one.
        costs: of the run, see `foldcp.runtime.report.costs`.
    """
    if not folded and not scored and not failed:
        return [
            f"nothing to do, all {skipped} predictions are there (--override makes them again): "
            f"{folder}"
        ]
    counts = [f"{len(folded)} folded"] if folded or not scored else []
    counts += [f"{len(scored)} with affinity"] if scored else []
    counts += [f"{failed} failed"] if failed else []
    counts += [f"{skipped} skipped as done"] if skipped else []
    text = [f"{', '.join(counts)} in {clock(costs['seconds'])}, {_peak(costs)}"]
    names = [*folded, *(name for name in scored if name not in folded)]
    width = max(map(len, names), default=0)
    for name in names:
        found = (_scores(folder / "predictions" / name, name, *kind) for kind in _SCORES.items())
        text.append(f"  {name:{width}}  {'  '.join(filter(None, found))}".rstrip())
    return [*text, f"results: {folder / 'predictions'}"]


def shortened(text: list[str]) -> list[str]:
    """Shorten the lines for a screen: of a long list, keep the first ones."""
    rest = len(text) - 2 - _SHOWN
    if rest <= 0:
        return text
    return [*text[: 1 + _SHOWN], f"  and {rest} more, all of them in foldcp.log", text[-1]]


def _peak(costs: dict[str, Any]) -> str:
    on_gpu = any(costs["peak_gpu_bytes"])
    peaks = costs["peak_gpu_bytes" if on_gpu else "peak_rss_bytes"]
    where = "GPU memory" if on_gpu else "memory"
    each = " per rank" if len(peaks) > 1 else ""
    return f"peak {where} {max(peaks) / 1e9:.3g} GB{each}"


def _scores(folder: Path, name: str, file_name: str, keys: dict[str, str]) -> str:
    """The scores of one file of a prediction; "" where it has none."""
    try:
        with open_regular(folder / file_name.format(name)) as file:
            found = json.load(file)
        return "  ".join(f"{label} {found[key]:.3f}" for label, key in keys.items())
    except (OSError, Unsafe, ValueError, KeyError, TypeError):
        return ""
