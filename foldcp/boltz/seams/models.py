"""List what modules of foldcp do in the place of Boltz's: (our file, what, stock's bodies)."""

from __future__ import annotations

IMITATED: tuple[tuple[str, str, str], ...] = (
    ("boltz/families/predict_step.py", "what a prediction hands out",
     "model.models.boltz2:Boltz2.predict_step model.models.boltz1:Boltz1.predict_step"),
    ("modules/model.py", "the order of the stages",
     "model.models.boltz2:Boltz2.forward"),
    ("modules/boltz1/model.py", "the order of the stages",
     "model.models.boltz1:Boltz1.forward"),
    ("modules/base.py", "the draws of dropout masks, which stock makes in eval mode too",
     "model.layers.dropout:get_dropout_mask"),
    ("modules/trunk/input_embedder.py", "embeddings of tokens and atoms",
     "model.modules.trunkv2:InputEmbedder.forward"),
    ("modules/trunk/pair_embedding.py", "the first pair representation",
     "model.modules.encodersv2:RelativePositionEncoder.forward "
     "model.modules.encoders:RelativePositionEncoder.forward "
     "model.modules.trunkv2:ContactConditioning.forward"),
    ("modules/trunk/templates.py", "templates",
     "model.modules.trunkv2:TemplateModule.forward model.modules.trunkv2:TemplateV2Module.forward"),
    ("modules/trunk/msa.py", "MSA blocks",
     "model.modules.trunkv2:MSAModule.forward model.modules.trunkv2:MSALayer.forward "
     "model.layers.pair_averaging:PairWeightedAveraging.forward "
     "model.layers.outer_product_mean:OuterProductMean.forward"),
    ("modules/trunk/pairformer.py", "pairformer blocks",
     "model.layers.pairformer:PairformerLayer.forward "
     "model.layers.pairformer:PairformerModule.forward "
     "model.layers.pairformer:PairformerNoSeqLayer.forward "
     "model.layers.pairformer:PairformerNoSeqModule.forward "
     "model.layers.attentionv2:AttentionPairBias.forward "
     "model.layers.attention:AttentionPairBias.forward"),
    ("modules/trunk/triangle.py", "triangle ops",
     "model.layers.triangular_mult:TriangleMultiplicationOutgoing.forward "
     "model.layers.triangular_mult:TriangleMultiplicationIncoming.forward "
     "model.layers.triangular_attention.attention:TriangleAttention.forward "
     "model.layers.triangular_attention.primitives:Attention.forward "
     "model.layers.triangular_attention.primitives:Attention._prep_qkv "
     "model.layers.triangular_attention.primitives:Attention._wrap_up "
     "model.layers.triangular_attention.primitives:_attention "
     "model.layers.triangular_attention.primitives:LayerNorm.forward "
     "model.layers.triangular_attention.primitives:Linear.forward"),
    ("modules/trunk/transition.py", "transitions",
     "model.layers.transition:Transition.forward"),
    ("modules/boltz1/trunk.py", "the trunk of Boltz-1",
     "model.modules.trunk:InputEmbedder.forward model.modules.trunk:MSAModule.forward "
     "model.modules.trunk:MSALayer.forward model.modules.trunk:PairformerModule.forward "
     "model.modules.trunk:PairformerLayer.forward"),
    ("modules/diffusion/conditioning.py", "what the score model is conditioned on",
     "model.modules.diffusion_conditioning:DiffusionConditioning.forward "
     "model.modules.encodersv2:PairwiseConditioning.forward "
     "model.modules.encoders:PairwiseConditioning.forward"),
    ("modules/diffusion/score_model.py", "one evaluation of the score model",
     "model.modules.diffusionv2:DiffusionModule.forward "
     "model.modules.diffusionv2:AtomDiffusion.preconditioned_network_forward "
     "model.modules.diffusionv2:AtomDiffusion.c_skip model.modules.diffusionv2:AtomDiffusion.c_out "
     "model.modules.diffusionv2:AtomDiffusion.c_in model.modules.diffusionv2:AtomDiffusion.c_noise "
     "model.modules.encodersv2:FourierEmbedding.forward "
     "model.modules.encodersv2:SingleConditioning.forward"),
    ("modules/diffusion/sampler.py", "the loop of the sampler, with its draws in stock's order",
     "model.modules.diffusionv2:AtomDiffusion.sample"),
    ("modules/diffusion/noise.py", "noise levels",
     "model.modules.diffusionv2:AtomDiffusion.sample_schedule "
     "model.modules.diffusion:AtomDiffusion.sample_schedule"),
    ("modules/diffusion/superposition.py", "random rotations and rigid alignment",
     "model.modules.utils:compute_random_augmentation model.modules.utils:random_rotations "
     "model.modules.utils:random_quaternions model.modules.utils:quaternion_to_matrix "
     "model.loss.diffusionv2:weighted_rigid_align model.loss.diffusion:weighted_rigid_align"),
    ("modules/diffusion/token_transformer.py", "the transformer over tokens",
     "model.modules.transformersv2:AdaLN.forward "
     "model.modules.transformersv2:ConditionedTransitionBlock.forward "
     "model.modules.transformersv2:DiffusionTransformer.forward "
     "model.modules.transformersv2:DiffusionTransformerLayer.forward "
     "model.modules.utils:SwiGLU.forward"),
    ("modules/atoms/encoder.py", "atom features and pairs within windows",
     "model.modules.encodersv2:AtomEncoder.forward "
     "model.modules.encodersv2:AtomAttentionEncoder.forward "
     "model.modules.encodersv2:AtomAttentionDecoder.forward "
     "model.modules.encodersv2:get_indexing_matrix model.modules.encodersv2:single_to_keys "
     "model.modules.encoders:AtomAttentionEncoder.forward "
     "model.modules.encoders:AtomAttentionDecoder.forward "
     "model.modules.encoders:get_indexing_matrix model.modules.encoders:single_to_keys"),
    ("modules/atoms/transformer.py", "the transformer over atoms",
     "model.modules.transformersv2:AtomTransformer.forward "
     "model.modules.transformers:AtomTransformer.forward"),
    ("modules/boltz1/diffusion.py", "the diffusion of Boltz-1",
     "model.modules.diffusion:DiffusionModule.forward "
     "model.modules.diffusion:OutTokenFeatUpdate.forward "
     "model.modules.diffusion:AtomDiffusion.preconditioned_network_forward "
     "model.modules.diffusion:AtomDiffusion.sample model.modules.diffusion:AtomDiffusion.c_skip "
     "model.modules.diffusion:AtomDiffusion.c_out model.modules.diffusion:AtomDiffusion.c_in "
     "model.modules.diffusion:AtomDiffusion.c_noise "
     "model.modules.encoders:FourierEmbedding.forward "
     "model.modules.encoders:SingleConditioning.forward model.modules.transformers:AdaLN.forward "
     "model.modules.transformers:ConditionedTransitionBlock.forward "
     "model.modules.transformers:DiffusionTransformer.forward "
     "model.modules.transformers:DiffusionTransformerLayer.forward"),
    ("modules/confidence/distogram.py", "the distogram",
     "model.modules.trunkv2:DistogramModule.forward model.modules.trunk:DistogramModule.forward"),
    ("modules/confidence/module.py", "the confidence module of Boltz-2",
     "model.modules.confidencev2:ConfidenceModule.forward"),
    ("modules/boltz1/confidence.py", "the confidence module of Boltz-1",
     "model.modules.confidence:ConfidenceModule.forward"),
    ("modules/confidence/heads.py", "the heads of PAE, PDE and pLDDT",
     "model.modules.confidencev2:ConfidenceHeads.forward "
     "model.modules.confidence:ConfidenceHeads.forward"),
    ("modules/confidence/scores.py", "pTM, ipTM and what they are made of",
     "model.layers.confidence_utils:compute_aggregated_metric "
     "model.layers.confidence_utils:tm_function model.layers.confidence_utils:compute_ptms "
     "model.layers.confidence_utils:compute_frame_pred "
     "model.layers.confidence_utils:compute_collinear_mask "
     "model.modules.confidence_utils:compute_aggregated_metric "
     "model.modules.confidence_utils:tm_function model.modules.confidence_utils:compute_ptms "
     "model.loss.confidence:compute_frame_pred model.loss.confidence:compute_collinear_mask"),
    ("boltz/steering/factory.py", "which potentials steer, and when",
     "model.potentials.potentials:get_potentials model.potentials.potentials:Potential "
     "model.potentials.schedules:ExponentialInterpolation "
     "model.potentials.schedules:PiecewiseStepFunction"),
    ("boltz/steering/terms.py", "energies and gradients of potentials",
     "model.potentials.potentials:FlatBottomPotential "
     "model.potentials.potentials:ReferencePotential "
     "model.potentials.potentials:DistancePotential "
     "model.potentials.potentials:DihedralPotential "
     "model.potentials.potentials:AbsDihedralPotential"),
    ("boltz/steering/potentials.py", "which atoms a potential is of",
     "model.potentials.potentials:PoseBustersPotential "
     "model.potentials.potentials:ConnectionsPotential "
     "model.potentials.potentials:SymmetricChainCOMPotential "
     "model.potentials.potentials:StereoBondPotential "
     "model.potentials.potentials:ChiralAtomPotential "
     "model.potentials.potentials:PlanarBondPotential "
     "model.potentials.potentials:TemplateReferencePotential "
     "model.potentials.potentials:ContactPotentital"),
    ("boltz/steering/overlap.py", "chains that overlap",
     "model.potentials.potentials:VDWOverlapPotential"),
)  # fmt: skip
