"""Read from the modules of a loaded Boltz-1 which options the tiled ones have."""

from __future__ import annotations

from typing import Any

from foldcp.boltz.families import boltz2_options
from foldcp.modules.atoms.encoder import AtomEncoderOptions
from foldcp.modules.boltz1.confidence import ConfidenceOptions, TrunkOptions
from foldcp.modules.boltz1.diffusion import SamplerOptions
from foldcp.modules.boltz1.trunk import PairformerOptions
from foldcp.modules.confidence.distogram import DistogramOptions
from foldcp.modules.confidence.heads import ConfidenceHeadsOptions
from foldcp.modules.confidence.scores import InterfaceWeights
from foldcp.modules.trunk.msa import MSAOptions
from foldcp.modules.trunk.pair_embedding import RelativePositionOptions


def relative_position(twin: Any) -> RelativePositionOptions:
    """Return the options of a RelativePositionEncoder."""
    return RelativePositionOptions(twin.r_max, twin.s_max, entities_only=False, cyclic=True)


def atom_encoder(twin: Any) -> AtomEncoderOptions:
    """Return the options of an AtomAttentionEncoder, which are alike for all."""
    boltz2_options.check_windows(twin)
    return AtomEncoderOptions(mask=True, names=True, backbone=False, residues=False)


def input_embedder(twin: Any) -> AtomEncoderOptions:
    """Return the options of an InputEmbedder."""
    return atom_encoder(twin.atom_attention_encoder)


def msa(twin: Any) -> MSAOptions:
    """Return the options of an MSAModule."""
    return boltz2_options.msa(twin)


def pairformer(twin: Any) -> PairformerOptions:
    """Return the options of a PairformerModule."""
    return PairformerOptions(tuple(not block.no_update_s for block in twin.layers))


def distogram(twin: Any) -> DistogramOptions:
    """Return the options of a DistogramModule, which has one distogram."""
    return DistogramOptions(bins=twin.distogram.out_features)


def sampler(twin: Any) -> SamplerOptions:
    """Return the options of an AtomDiffusion."""
    return SamplerOptions(
        **vars(boltz2_options.sampler(twin)),
        atoms=atom_encoder(twin.score_model.atom_attention_encoder),
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
        pairformer=pairformer(twin.pairformer_module if own_trunk else twin.pairformer_stack),
        trunk=_trunk(twin) if own_trunk else None,
        reads_diffusion=twin.use_s_diffusion,
    )


def _trunk(twin: Any) -> TrunkOptions:
    return TrunkOptions(atoms=input_embedder(twin.input_embedder), msa=msa(twin.msa_module))
