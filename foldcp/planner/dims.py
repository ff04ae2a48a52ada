"""State the sizes of the models that the planner counts with, as Boltz publishes them.

Source: hyper-parameters of the public checkpoints boltz1_conf.ckpt and boltz2_conf.ckpt, with the
depths that `boltz predict` sets; bench/synthetic/checkpoint.py builds models from the same.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Dims:
    """Sizes of one model; the defaults are those of Boltz-2.

    Args:
        token_s: channels of the single.
        token_z: channels of the pair.
        atom_s: channels of an atom.
        atom_z: channels of a pair of atoms.
        msa_s: channels of an entry of the alignment.
        single_heads: of attention with pair bias.
        pair_heads: of triangle attention.
        head_width: channels of a head of triangle attention.
        widening: hidden channels of a transition over its channels.
        pairformer_blocks: of the trunk.
        msa_blocks: of the MSA module.
        msa_rows: of the alignment that the module takes.
        outer_width: channels of each factor of the outer product mean.
        averaging_heads: of pair weighted averaging.
        averaging_width: channels of one of them.
        template_z: channels of a template's pairs; 0 without templates.
        template_blocks: of the template module.
        conditioning_transitions: of the pairwise conditioning.
        token_layers: of the diffusion transformer.
        token_heads: of one of its layers.
        atom_layers: of the atom encoder, and as many of the decoder.
        atom_heads: of one of them.
        queries: atoms of a window.
        keys: atoms that a window attends to.
        bins: of the distogram, of the errors, and of the distances that confidence embeds.
        confidence_blocks: of the pairformer that rates a sample.
        confidence_msa_blocks: of an MSA module in front of it.
        itemsize: bytes of an element of what the pair and MSA tracks compute in on a GPU.
    """

    token_s: int = 384
    token_z: int = 128
    atom_s: int = 128
    atom_z: int = 16
    msa_s: int = 64
    single_heads: int = 16
    pair_heads: int = 4
    head_width: int = 32
    widening: int = 4
    pairformer_blocks: int = 64
    msa_blocks: int = 4
    msa_rows: int = 1024
    outer_width: int = 32
    averaging_heads: int = 8
    averaging_width: int = 32
    template_z: int = 64
    template_blocks: int = 2
    conditioning_transitions: int = 2
    token_layers: int = 24
    token_heads: int = 16
    atom_layers: int = 3
    atom_heads: int = 4
    queries: int = 32
    keys: int = 128
    bins: int = 64
    confidence_blocks: int = 8
    confidence_msa_blocks: int = 0
    itemsize: int = 2


BOLTZ2 = Dims()
# Float32 throughout, no templates; its confidence module repeats the trunk.
BOLTZ1 = Dims(
    pairformer_blocks=48, template_z=0, template_blocks=0, confidence_blocks=48,
    confidence_msa_blocks=4, itemsize=4,
)  # fmt: skip
MODELS = {"boltz2": BOLTZ2, "boltz1": BOLTZ1}


def dims_of(model: str) -> Dims:
    """Return the sizes of a model.

    Args:
        model: "boltz2" or "boltz1".

    Raises:
        ValueError: there is no such model.
    """
    if model not in MODELS:
        raise ValueError(f"`model` is {model!r}; use one of {', '.join(MODELS)}")
    return MODELS[model]
