"""Say what foldcp knows of one family of Boltz's models, as one value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foldcp.boltz.lightning.data import RootData
from foldcp.config.precision import PRESETS, Precision
from foldcp.fabric.mesh import Mesh
from foldcp.modules.confidence.ratings import Ratings
from foldcp.modules.hooks import Folded, Outputs
from foldcp.modules.model import FoldOnMesh
from foldcp.modules.settings import Features, Parts

Tiled = Callable[[nn.Module, Mesh], nn.Module]  # makes a tiled module of its twin
Steering = Callable[[Features, torch.device], Any]

_SCORES = ("plddt", "complex_plddt", "complex_iplddt", "complex_pde", "complex_ipde")


@dataclass(frozen=True)
class ModelFamily:
    """One family: `foldcp.boltz.families.boltz2.BOLTZ2` or `boltz1.BOLTZ1`.

    Args:
        name: as in messages.
        stock: Boltz's class; its subclasses belong to the family, too.
        data_module: featurises inputs compactly, on the root rank.
        precisions: in which it runs; the first is the usual one.
        parts: tells the optional parts of a model.
        affinity: tells a model that predicts affinities; the root rank runs it as stock.
        check: refuses a model that cannot be swapped, with a ValueError.
        swaps: makes the tiled modules by the attributes whose place they take, for these parts.
        fold: the order of the stages.
        steering: makes the steering of a model's samples, None for one without.
        errors: matrices of expected errors that stock hands out, given predict_args.
        prediction: makes stock's prediction dict.
    """

    name: str
    stock: type[nn.Module]
    data_module: type[RootData]
    precisions: tuple[str, ...]
    parts: Callable[[Any], Parts]
    affinity: Callable[[Any], bool]
    check: Callable[[Any], None]
    swaps: Callable[[Parts], dict[str, Tiled]]
    fold: type[FoldOnMesh]
    steering: Callable[[Any], Steering | None]
    errors: Callable[[Mapping[str, Any]], tuple[str, ...]]
    prediction: Callable[[Any, Folded], dict[str, Any]]

    @property
    def featurizer(self) -> Any:
        """Return the class that computes compact features in place of stock's featuriser."""
        return self.data_module.featurizer

    def precision(self, asked: Precision) -> Precision:
        """Return the formats in which the family runs where these are asked for."""
        return asked if asked.pair in self.precisions else PRESETS[self.precisions[0]]


def uncompiled(module: nn.Module) -> Any:
    """Return the module that torch.compile made another one from, or the module itself."""
    return dict(module.named_children()).get("_orig_mod", module)


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


def _score(rated: Ratings) -> Tensor:
    """Score each sample [M] as stock does, of pLDDT and ipTM (pTM for a single chain)."""
    iptm, ptm = rated.tm.iptm, rated.tm.ptm
    fit = ptm if torch.allclose(iptm, torch.zeros_like(iptm)) else iptm
    return (4 * rated.complex_plddt + fit) / 5
