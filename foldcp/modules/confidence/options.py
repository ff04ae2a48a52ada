"""The choices of a confidence module, which the family of a model makes."""

from __future__ import annotations

from dataclasses import dataclass

from foldcp.modules.confidence.heads import ConfidenceHeadsOptions
from foldcp.modules.confidence.scores import InterfaceWeights
from foldcp.modules.trunk.pair_embedding import ContactOptions, RelativePositionOptions


@dataclass(frozen=True)
class ConfidenceOptions:
    """Say what a confidence module computes.

    Attributes:
        heads: its output heads.
        interface: what counts for the interface-weighted pLDDT.
        norms_single: the single is normalised first.
        adds_inputs: the input embedding is added to the single.
        adds_product: the product of both tokens' inputs is added to a pair.
        relative_position: how relative positions are counted, which are added to a pair with its
            bonds; None adds neither.
        bond_types: bonds have types.
        contacts: contact constraints with these distances are added, too; None: they are not.
    """

    heads: ConfidenceHeadsOptions
    interface: InterfaceWeights
    norms_single: bool
    adds_inputs: bool
    adds_product: bool
    relative_position: RelativePositionOptions | None
    bond_types: bool = False
    contacts: ContactOptions | None = None
