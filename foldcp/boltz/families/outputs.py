"""Give the outputs of a prediction the names that Boltz's callers know them by."""

from __future__ import annotations

from typing import Any

import torch

from foldcp.modules.confidence.ratings import Ratings
from foldcp.modules.hooks import Outputs

_SCORES = ("plddt", "complex_plddt", "complex_iplddt", "complex_pde", "complex_ipde")


def stock_names(outputs: Outputs) -> dict[str, Any]:
    """Return the outputs by the names that they have in Boltz's forward; what is None is left out.

    Args:
        outputs: of the root rank.
    """
    named: dict[str, Any] = {"s": outputs.s, "sample_atom_coords": outputs.coords}
    named |= {"pbfactor": outputs.bfactor, "z": outputs.z}
    rated = outputs.ratings
    if rated is not None:
        named |= {name: getattr(rated, name) for name in (*_SCORES, "pae", "pde")}
        named |= vars(rated.tm)
        named["confidence_score"] = _score(rated)
    return {name: value for name, value in named.items() if value is not None}


def _score(rated: Ratings) -> torch.Tensor:
    """Score each sample [M] as stock does, of pLDDT and ipTM (pTM for a single chain)."""
    iptm, ptm = rated.tm.iptm, rated.tm.ptm
    fit = ptm if torch.allclose(iptm, torch.zeros_like(iptm)) else iptm
    return (4 * rated.complex_plddt + fit) / 5
