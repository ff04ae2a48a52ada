"""Read from the modules of a loaded Boltz-1 which options the tiled ones have."""

from __future__ import annotations

from typing import Any

from foldcp.boltz.families import boltz2_options
from foldcp.modules.atoms.encoder import AtomEncoderOptions
from foldcp.modules.boltz1.confidence import ConfidenceOptions
from foldcp.modules.boltz1.diffusion import SamplerOptions
from foldcp.modules.confidence.distogram import DistogramOptions
from foldcp.modules.confidence.heads import ConfidenceHeadsOptions
from foldcp.modules.confidence.scores import InterfaceWeights
from foldcp.modules.trunk.pair_embedding import RelativePositionOptions

_ATOMS = AtomEncoderOptions(mask=True, names=True, backbone=False, residues=False)


def relative_position(twin: Any) -> RelativePositionOptions:
    """Return the options of a RelativePositionEncoder."""
    return RelativePositionOptions(twin.r_max, twin.s_max, entities_only=False, cyclic=True)


def input_embedder(twin: Any) -> AtomEncoderOptions:
    """Return the options of an InputEmbedder, which are alike for all."""
    return _ATOMS


def distogram(twin: Any) -> DistogramOptions:
    """Return the options of a DistogramModule, which has one distogram."""
    return DistogramOptions(bins=twin.distogram.out_features)


def sampler(twin: Any) -> SamplerOptions:
    """Return the options of an AtomDiffusion."""
    return SamplerOptions(
        **vars(boltz2_options.sampler(twin)),
        atoms=_ATOMS,
        gathers_tokens=twin.accumulate_token_repr,
    )


def confidence(twin: Any) -> ConfidenceOptions:
    """Return the options of a ConfidenceModule."""
    own_trunk = twin.imitate_trunk
    pairs = own_trunk or twin.add_z_input_to_z
    return ConfidenceOptions(
        heads=ConfidenceHeadsOptions(separate=False, atoms_per_token=0),
        interface=InterfaceWeights(ligand=2.0, interface=1.0, other=0.0, floor=1e-5),
        norms_single=not twin.no_update_s,
        adds_inputs=not own_trunk and twin.add_s_input_to_s,
        adds_product=twin.add_s_to_z_prod,
        relative_position=relative_position(twin.rel_pos) if pairs else None,
        trunk=_ATOMS if own_trunk else None,
        reads_diffusion=twin.use_s_diffusion,
    )
