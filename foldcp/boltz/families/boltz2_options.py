"""Read from the modules of a loaded Boltz-2 which options the tiled ones have."""

from __future__ import annotations

from typing import Any

from foldcp.layout.tiles import KEYS, WINDOW
from foldcp.modules.atoms.encoder import AtomEncoderOptions
from foldcp.modules.confidence.distogram import DistogramOptions
from foldcp.modules.confidence.heads import ConfidenceHeadsOptions
from foldcp.modules.confidence.options import ConfidenceOptions
from foldcp.modules.confidence.scores import InterfaceWeights
from foldcp.modules.diffusion.noise import SamplerOptions
from foldcp.modules.trunk.input_embedder import InputEmbedderOptions
from foldcp.modules.trunk.msa import MSAOptions
from foldcp.modules.trunk.pair_embedding import ContactOptions, RelativePositionOptions
from foldcp.modules.trunk.templates import TemplateOptions


def relative_position(twin: Any) -> RelativePositionOptions:
    """Return the options of a RelativePositionEncoder."""
    return RelativePositionOptions(
        r_max=twin.r_max,
        s_max=twin.s_max,
        entities_only=twin.fix_sym_check,
        cyclic=twin.cyclic_pos_enc,
    )


def check_windows(twin: Any) -> None:
    """Refuse an atom encoder whose windows have other sizes than published models have.

    Args:
        twin: Boltz's AtomEncoder, or Boltz-1's AtomAttentionEncoder.

    Raises:
        ValueError: they have.
    """
    queries, keys = twin.atoms_per_window_queries, twin.atoms_per_window_keys
    if (queries, keys) != (WINDOW, KEYS):
        raise ValueError(
            f"`model` has windows of {queries} queries and {keys} keys; foldcp expects {WINDOW} "
            f"and {KEYS}: use a Boltz checkpoint with these"
        )


def atom_encoder(twin: Any) -> AtomEncoderOptions:
    """Return the options of an AtomEncoder."""
    check_windows(twin)
    return AtomEncoderOptions(
        mask=False,
        names=not twin.use_no_atom_char,
        backbone=twin.use_atom_backbone_feat,
        residues=twin.use_residue_feats_atoms,
    )


def input_embedder(twin: Any) -> InputEmbedderOptions:
    """Return the options of an InputEmbedder."""
    return InputEmbedderOptions(
        atoms=atom_encoder(twin.atom_encoder),
        method=twin.add_method_conditioning,
        modified=twin.add_modified_flag,
        cyclic=twin.add_cyclic_flag,
        molecule=twin.add_mol_type_feat,
    )


def msa(twin: Any) -> MSAOptions:
    """Return the options of an MSAModule."""
    return MSAOptions(
        paired=twin.use_paired_feature,
        most_rows=twin.num_subsampled_msa if twin.subsample_msa else None,
    )


def template(twin: Any) -> TemplateOptions:
    """Return the options of a TemplateModule or TemplateV2Module."""
    return TemplateOptions(shortest=twin.min_dist, longest=twin.max_dist, bins=twin.num_bins)


def contacts(twin: Any) -> ContactOptions:
    """Return the options of a ContactConditioning."""
    return ContactOptions(shortest=twin.cutoff_min, longest=twin.cutoff_max)


def distogram(twin: Any) -> DistogramOptions:
    """Return the options of a DistogramModule."""
    return DistogramOptions(bins=twin.num_bins)


def diffusion_conditioning(twin: Any) -> AtomEncoderOptions:
    """Return the options of a DiffusionConditioning."""
    return atom_encoder(twin.atom_encoder)


def sampler(twin: Any) -> SamplerOptions:
    """Return the options of an AtomDiffusion."""
    return SamplerOptions(
        sigma_min=twin.sigma_min,
        sigma_max=twin.sigma_max,
        sigma_data=twin.sigma_data,
        rho=twin.rho,
        gamma_0=twin.gamma_0,
        gamma_min=twin.gamma_min,
        noise_scale=twin.noise_scale,
        step_scale=twin.step_scale,
        num_sampling_steps=twin.num_sampling_steps,
        alignment_reverse_diff=twin.alignment_reverse_diff,
    )


def confidence(twin: Any) -> ConfidenceOptions:
    """Return the options of a ConfidenceModule."""
    heads, pairs = twin.confidence_heads, twin.add_z_input_to_z
    return ConfidenceOptions(
        heads=ConfidenceHeadsOptions(
            separate=heads.use_separate_heads,
            atoms_per_token=0 if heads.token_level_confidence else heads.max_num_atoms_per_token,
        ),
        interface=InterfaceWeights(),
        norms_single=not twin.no_update_s,
        adds_inputs=twin.add_s_input_to_s,
        adds_product=twin.add_s_to_z_prod,
        relative_position=relative_position(twin.rel_pos) if pairs else None,
        bond_types=pairs and twin.bond_type_feature,
        contacts=contacts(twin.contact_conditioning) if pairs else None,
    )
