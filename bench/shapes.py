"""Inputs of every fused op in the shapes of Boltz-2, drawn at random.

N tokens, C = 128 pair channels, 64 MSA channels, 384 single channels, 8 atoms a token. Weights are
scaled so that each op's output is of order one. Attention keeps all keys, as Boltz does for one
complex at a time, but for the case named masked; masks drop single pairs but never all keys of a
line, so that every implementation agrees on every output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PAIR, TEMPLATE, MSA, SINGLE, TOKEN = 128, 64, 64, 384, 768
HEADS, HEAD_DIM = 4, 32
TOKEN_HEADS, TRUNK_DIM, DIFFUSION_DIM = 16, 24, 48
SAMPLES, LAYERS = 5, 24
OPM_DIM, AVERAGING_HEADS = 32, 8
QUERIES, KEYS, ATOMS_PER_TOKEN = 32, 128, 8
BINS = 64
RELATIVE = 139  # one-hot channels: 66 residues, 66 tokens, 1 entity, 6 chains
SEQUENCES = {"cuda": 1024, "cpu": 32}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Draw:
    """Random tensors of one dtype on one device, the same for the same seed.

    Args:
        dtype: of what is drawn.
        device: where it lives.
        seed: of the generator.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.sequences = SEQUENCES.get(device.type, 32)

    def normal(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        """Normal numbers, a slice of dim 0 or 1 at a time (no float32 copy of the whole)."""
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        for part in out.flatten(0, 1).chunk(16) if out.ndim > 2 else (out,):
            x = torch.randn(part.shape, device=self.device, generator=self.generator)
            part.copy_(x.mul_(scale).add_(shift))
        return out

    def linear(self, outs: int, ins: int) -> Tensor:
        """A weight [outs, ins] that keeps the variance."""
        return self.normal(outs, ins, scale=ins**-0.5)

    def norm(self, channels: int, name: str) -> dict[str, Tensor]:
        """Gain and shift of a LayerNorm, `<name>_weight` and `<name>_bias`."""
        return {
            f"{name}_weight": self.normal(channels, scale=0.1, shift=1.0),
            f"{name}_bias": self.normal(channels, scale=0.1),
        }

    def pair_mask(self, n: int, holes: bool = True) -> Tensor:
        """[1, n, n], 1 = keep; with holes 0 on the diagonal and one more pair of each line."""
        mask = torch.ones(1, n, n, dtype=self.dtype, device=self.device)
        if not holes:
            return mask
        index = torch.arange(n, device=self.device)
        mask[0, index, index] = 0
        mask[0, index, (index + n // 3) % n] = 0
        return mask


Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Op:
    """One case of the benchmark.

    Args:
        name: as in tables.
        make: its inputs for N tokens.
        residual: the input that the op adds its update to, None when it returns something new.
    """

    name: str
    make: Callable[[Draw, int], Inputs]
    residual: str | None = None


def _core(draw: Draw, n: int, holes: bool = False) -> Inputs:
    q, k, v = (draw.normal(1, n, HEADS, n, HEAD_DIM) for _ in range(3))
    bias = draw.normal(1, 1, HEADS, n, n)
    return dict(q=q, k=k, v=v, bias=bias, keep=draw.pair_mask(n, holes) > 0)


def _multiplication(draw: Draw, n: int, c: int = PAIR) -> Inputs:
    return dict(
        z=draw.normal(1, n, n, c), mask=draw.pair_mask(n),
        **draw.norm(c, "norm_in"), p_in=draw.linear(2 * c, c), g_in=draw.linear(2 * c, c),
        **draw.norm(c, "norm_out"), p_out=draw.linear(c, c), g_out=draw.linear(c, c),
    )  # fmt: skip


def _attention(draw: Draw, n: int, c: int = PAIR) -> Inputs:
    hd = HEADS * HEAD_DIM
    return dict(
        z=draw.normal(1, n, n, c), mask=draw.pair_mask(n, False), **draw.norm(c, "norm"),
        bias=draw.linear(HEADS, c), q=draw.linear(hd, c), k=draw.linear(hd, c),
        v=draw.linear(hd, c), g=draw.linear(hd, c), o=draw.linear(c, hd),
    )  # fmt: skip


def _token_attention(draw: Draw, n: int, samples: int, d: int) -> Inputs:
    q, k, v = (draw.normal(1, samples, TOKEN_HEADS, n, d) for _ in range(3))
    return dict(q=q, k=k, v=v, bias=draw.normal(1, 1, TOKEN_HEADS, n, n))


def _atom_attention(draw: Draw, n: int) -> Inputs:
    windows = n * ATOMS_PER_TOKEN // QUERIES
    q = draw.normal(windows, SAMPLES, HEADS, QUERIES, HEAD_DIM)
    k, v = (draw.normal(windows, SAMPLES, HEADS, KEYS, HEAD_DIM) for _ in range(2))
    keep = torch.ones(windows, SAMPLES, KEYS, dtype=torch.bool, device=draw.device)
    keep[0, :, : (KEYS - QUERIES) // 2] = False  # the first window has no keys on its left
    return dict(q=q, k=k, v=v, bias=draw.normal(windows, 1, HEADS, QUERIES, KEYS), keep=keep)


def _transition(draw: Draw, *shape: int) -> Inputs:
    c = shape[-1]
    return dict(
        x=draw.normal(*shape), **draw.norm(c, "norm"), fc1=draw.linear(4 * c, c),
        fc2=draw.linear(4 * c, c), fc3=draw.linear(c, 4 * c),
    )  # fmt: skip


def _outer_product_mean(draw: Draw, n: int) -> Inputs:
    s = draw.sequences
    keep = (torch.rand(1, s, n, device=draw.device, generator=draw.generator) < 0.9).to(draw.dtype)
    a, b = (draw.normal(1, s, n, OPM_DIM) * keep[..., None] for _ in range(2))
    count = keep.float().transpose(1, 2) @ keep.float()
    return dict(
        z=draw.normal(1, n, n, PAIR), a=a, b=b, count=count,
        weight=draw.linear(PAIR, OPM_DIM**2), bias=draw.normal(PAIR),
    )  # fmt: skip


def _pair_weighted_averaging(draw: Draw, n: int) -> Inputs:
    hd = AVERAGING_HEADS * OPM_DIM
    return dict(
        m=draw.normal(1, draw.sequences, n, MSA), z=draw.normal(1, n, n, PAIR),
        **draw.norm(MSA, "norm_m"), **draw.norm(PAIR, "norm_z"),
        proj_m=draw.linear(hd, MSA), proj_g=draw.linear(hd, MSA),
        proj_z=draw.linear(AVERAGING_HEADS, PAIR), proj_o=draw.linear(MSA, hd),
    )  # fmt: skip


def _token_bias(draw: Draw, n: int) -> Inputs:
    outs = LAYERS * TOKEN_HEADS
    gains = draw.normal(LAYERS, PAIR, scale=0.1, shift=1.0)
    shifts = draw.normal(LAYERS, PAIR, scale=0.1)
    return dict(
        z=draw.normal(1, n, n, PAIR), gains=gains, shifts=shifts, weight=draw.linear(outs, PAIR)
    )


def _relative_position(draw: Draw, n: int) -> Inputs:
    token = torch.arange(n, device=draw.device)
    chain = token * 3 // n
    start = torch.searchsorted(chain, chain)  # residues count from the first of their chain
    return dict(
        residue=token - start, token=token, chain=chain, entity=chain // 2,
        copy=chain % 2, weight=draw.normal(PAIR, RELATIVE),
    )  # fmt: skip


def _adaptive_norm(draw: Draw, n: int) -> Inputs:
    scale = draw.normal(1, n, TOKEN).sigmoid_()
    return dict(a=draw.normal(SAMPLES, n, TOKEN), scale=scale, shift=draw.normal(1, n, TOKEN))


def _head(draw: Draw, n: int) -> Inputs:
    centres = torch.arange(0.25, 32, 0.5, device=draw.device)
    return dict(z=draw.normal(1, n, n, PAIR), weight=draw.linear(BINS, PAIR), centres=centres)


def _distogram(draw: Draw, n: int) -> Inputs:
    return _head(draw, n) | dict(bias=draw.normal(BINS))


# The first ones first: that is the order in which a run with little time goes through them.
OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op("triangle_attention_core", _core),
        Op("triangle_multiplication", _multiplication, "z"),
        Op("triangle_attention", _attention, "z"),
        Op("transition_pair", lambda d, n: _transition(d, 1, n, n, PAIR), "x"),
        Op(
            "token_attention_diffusion", lambda d, n: _token_attention(d, n, SAMPLES, DIFFUSION_DIM)
        ),
        Op("token_attention_trunk", lambda d, n: _token_attention(d, n, 1, TRUNK_DIM)),
        Op("token_bias", _token_bias),
        Op("outer_product_mean", _outer_product_mean, "z"),
        Op("pair_weighted_averaging", _pair_weighted_averaging, "m"),
        Op("pae_head", _head),
        Op("pde_head", _head),
        Op("distogram_head", _distogram),
        Op("atom_attention", _atom_attention),
        Op("adaptive_norm", _adaptive_norm),
        Op("relative_position", _relative_position),
        Op("triangle_attention_core_masked", lambda d, n: _core(d, n, holes=True)),
        Op("triangle_multiplication_incoming", _multiplication, "z"),
        Op("triangle_attention_ending", _attention, "z"),
        Op("template_triangle_multiplication", lambda d, n: _multiplication(d, n, TEMPLATE), "z"),
        Op("template_triangle_attention", lambda d, n: _attention(d, n, TEMPLATE), "z"),
        Op("transition_msa", lambda d, n: _transition(d, 1, d.sequences, n, MSA), "x"),
        Op("transition_single", lambda d, n: _transition(d, 1, n, SINGLE), "x"),
    )
}


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The same numbers with every floating tensor in another dtype."""
    return {k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs.items()}
