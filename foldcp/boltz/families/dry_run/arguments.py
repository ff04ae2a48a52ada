"""State the hyperparameters of the published Boltz models, and of tiny ones for tests.

Those of size "real" are the public Boltz-2's (506,724,992 parameters) and Boltz-1's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

KINDS = ("boltz2", "boltz2_affinity", "boltz1")


@dataclass(frozen=True)
class Dimensions:
    """Widths and depths that `boltz predict` reads from the checkpoint."""

    token_s: int
    token_z: int
    atom_s: int
    atom_z: int
    fourier: int
    template: int
    template_blocks: int
    atom_blocks: int
    token_blocks: int
    token_heads: int
    confidence_blocks: int


SIZES: dict[str, Dimensions] = {
    "real": Dimensions(384, 128, 128, 16, 256, 64, 2, 3, 24, 16, 8),
    "tiny": Dimensions(64, 16, 32, 8, 32, 16, 1, 1, 2, 4, 1),
}
# Boltz reads these as attributes although prediction uses none of the values.
TRAINING = dict(
    recycling_steps=3, sampling_steps=20, diffusion_multiplicity=16, diffusion_samples=1,
    affinity_loss_weight=3e-3, confidence_loss_weight=3e-3, diffusion_loss_weight=4.0,
    distogram_loss_weight=3e-2, bfactor_loss_weight=1e-3, adam_beta_1=0.9, adam_beta_2=0.95,
    adam_eps=1e-8, lr_scheduler="af3", base_lr=0.0, max_lr=0.0018, lr_warmup_no_steps=1000,
    lr_start_decay_after_n_steps=50000, lr_decay_every_n_steps=50000, lr_decay_factor=0.95,
    weight_decay=0.003, weight_decay_exclude=True, symmetry_correction=True,
    run_confidence_sequentially=False,
)  # fmt: skip
VALIDATION = dict(
    recycling_steps=3, sampling_steps=200, diffusion_samples=5, symmetry_correction=True,
    run_confidence_sequentially=True,
)  # fmt: skip


def hyperparameters(size: str = "tiny", kind: str = "boltz2") -> dict[str, Any]:
    """Return the constructor arguments of a Boltz model.

    Args:
        size: "real" for the published dimensions, "tiny" for tests.
        kind: "boltz2", "boltz2_affinity" or "boltz1".

    Returns:
        Keyword arguments of `Boltz2` or `Boltz1`, as a checkpoint stores them.

    Raises:
        ValueError: unknown size or kind.
    """
    if size not in SIZES:
        raise ValueError(f"size: expected one of {sorted(SIZES)}, got {size!r}")
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {sorted(KINDS)}, got {kind!r}")
    dims = SIZES[size]
    arguments = _shared(dims) | (_boltz1(dims) if kind == "boltz1" else _boltz2(dims))
    if kind == "boltz2_affinity":
        arguments |= _affinity(dims)
    return arguments


def _shared(dims: Dimensions) -> dict[str, Any]:
    return dict(
        atom_s=dims.atom_s, atom_z=dims.atom_z, token_s=dims.token_s, token_z=dims.token_z,
        num_bins=64, atoms_per_window_queries=32, atoms_per_window_keys=128,
        training_args=OmegaConf.create(TRAINING), validation_args=OmegaConf.create(VALIDATION),
        confidence_prediction=True, alpha_pae=1.0, ema=True, ema_decay=0.999,
    )  # fmt: skip


def _boltz2(dims: Dimensions) -> dict[str, Any]:
    return dict(
        atom_feature_dim=388, embedder_args=dict(
            atom_encoder_depth=dims.atom_blocks, atom_encoder_heads=4, add_mol_type_feat=True,
            add_method_conditioning=True, add_modified_flag=True, add_cyclic_flag=True,
        ),
        msa_args=_msa(use_paired_feature=True), pairformer_args=_pairformer(64, v2=True),
        template_args=dict(template_dim=dims.template, template_blocks=dims.template_blocks,
                           activation_checkpointing=True),
        score_model_args=_score_model(dims, transformer_post_ln=False),
        diffusion_process_args=_diffusion(sigma_min=0.0001, noise_scale=1.003, step_scale=1.5),
        diffusion_loss_args=dict(add_smooth_lddt_loss=True, nucleotide_loss_weight=5.0,
                                 ligand_loss_weight=10.0, filter_by_plddt=0.0),
        confidence_model_args=dict(
            num_dist_bins=64, max_dist=22, add_s_to_z_prod=True, add_s_input_to_s=True,
            add_z_input_to_z=True, pairformer_args=_pairformer(dims.confidence_blocks),
            confidence_args=dict(num_plddt_bins=50, num_pde_bins=64, num_pae_bins=64,
                                 use_separate_heads=True),
        ),
        token_level_confidence=True, affinity_prediction=False, structure_prediction_training=True,
        validate_structure=True, exclude_ions_from_lddt=True, fix_sym_check=True,
        cyclic_pos_enc=True, bond_type_feature=True, aggregate_distogram=True, use_templates=True,
        use_templates_v2=True, predict_bfactor=True, conditioning_cutoff_min=4.0,
        conditioning_cutoff_max=20.0, checkpoint_diffusion_conditioning=True, num_val_datasets=1,
    )  # fmt: skip


def _affinity(dims: Dimensions) -> dict[str, Any]:
    head = dict(
        num_dist_bins=64, max_dist=22,
        pairformer_args=dict(num_blocks=dims.confidence_blocks, dropout=0.25,
                             activation_checkpointing=False),
        transformer_args=dict(token_s=dims.token_s, num_blocks=4, num_heads=8,
                              activation_checkpointing=False),
    )  # fmt: skip
    return dict(
        affinity_prediction=True, affinity_ensemble=True, affinity_mw_correction=True,
        affinity_model_args1=head, affinity_model_args2=copy.deepcopy(head),
    )  # fmt: skip


def _boltz1(dims: Dimensions) -> dict[str, Any]:
    return dict(
        atom_feature_dim=389,
        embedder_args=dict(atom_encoder_depth=dims.atom_blocks, atom_encoder_heads=4),
        msa_args=_msa(offload_to_cpu=False), pairformer_args=_pairformer(48, offload_to_cpu=False),
        score_model_args=_score_model(dims, offload_to_cpu=False),
        diffusion_process_args=_diffusion(sigma_min=0.0004, noise_scale=1.0, step_scale=1.0,
                                          use_inference_model_cache=True),
        diffusion_loss_args=dict(add_smooth_lddt_loss=True, nucleotide_loss_weight=5.0,
                                 ligand_loss_weight=10.0),
        confidence_model_args=dict(
            num_dist_bins=64, max_dist=22, add_s_to_z_prod=True, add_s_input_to_s=True,
            use_s_diffusion=True, add_z_input_to_z=True,
            confidence_args=dict(num_plddt_bins=50, num_pde_bins=64, num_pae_bins=64),
        ),
        nucleotide_rmsd_weight=5.0, ligand_rmsd_weight=10.0, structure_prediction_training=False,
        confidence_imitate_trunk=True,
    )  # fmt: skip


def _msa(**more: Any) -> dict[str, Any]:
    return dict(
        msa_s=64, msa_blocks=4, msa_dropout=0.15, z_dropout=0.25, pairwise_head_width=32,
        pairwise_num_heads=4, activation_checkpointing=True, **more,
    )  # fmt: skip


def _pairformer(blocks: int, **more: Any) -> dict[str, Any]:
    return dict(num_blocks=blocks, num_heads=16, dropout=0.25, activation_checkpointing=True) | more


def _score_model(dims: Dimensions, **more: Any) -> dict[str, Any]:
    return dict(
        sigma_data=16, dim_fourier=dims.fourier, atom_encoder_depth=dims.atom_blocks,
        atom_encoder_heads=4, token_transformer_depth=dims.token_blocks,
        token_transformer_heads=dims.token_heads, atom_decoder_depth=dims.atom_blocks,
        atom_decoder_heads=4, conditioning_transition_layers=2, activation_checkpointing=True,
        **more,
    )  # fmt: skip


def _diffusion(sigma_min: float, noise_scale: float, step_scale: float, **more: Any) -> dict:
    return dict(
        sigma_min=sigma_min, sigma_max=160.0, sigma_data=16.0, rho=7, P_mean=-1.2, P_std=1.5,
        gamma_0=0.8, gamma_min=1.0, noise_scale=noise_scale, step_scale=step_scale,
        coordinate_augmentation=True, alignment_reverse_diff=True, synchronize_sigmas=True, **more,
    )  # fmt: skip
