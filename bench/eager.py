"""Every op as stock Boltz computes it, in plain torch: the baseline of the benchmark.

Written for `bench.shapes` from the papers' algorithms, with the casts and chunks that Boltz 2.2.1
has: they run under autocast, widen where it widens, and attend 128 lines at a time on long inputs.
On float64 tensors they compute in float64 throughout, which makes them the reference too, except
for the ops that `foldcp_kernels.core.definitions` defines.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.shapes import Inputs
from foldcp_kernels.core import definitions as reference
from foldcp_kernels.transition import TransitionWeights
from foldcp_kernels.triangle_attention import TriangleAttentionWeights
from foldcp_kernels.triangle_multiplication import TriangleMultiplicationWeights

MASKED = 1e9
LONG, CHUNK, SHORT_CHUNK = 384, 128, 512  # Boltz chunks in 128 lines beyond 384 tokens
OPM_CHUNK = 4
CONTACT_BINS = 20  # of the 64 of the distogram: distances below 8 angstrom

Function = Callable[[Inputs], Tensor]


def wide(x: Tensor) -> Tensor:
    """float32, or float64 when it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def _norm(x: Tensor, t: Inputs, name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], t[f"{name}_weight"], t[f"{name}_bias"], 1e-5)


def _normed(x: Tensor, t: Inputs, name: str) -> Tensor:
    """LayerNorm in float32, as under CUDA autocast."""
    gain, shift = wide(t[f"{name}_weight"]), wide(t[f"{name}_bias"])
    return F.layer_norm(wide(x), x.shape[-1:], gain, shift, 1e-5).to(x.dtype)


def core(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, keep: Tensor) -> Tensor:
    """Attention of lines: q, k, v [1, I, H, J, D], bias [1, 1, H, J, K], keep [1, I, K]."""
    lines = q.shape[1]
    step = CHUNK if lines > LONG else SHORT_CHUNK
    masked = (wide(keep.to(q.dtype)) - 1)[:, :, None, None, :] * MASKED
    parts = []
    for lo in range(0, lines, step):
        part = slice(lo, lo + step)
        logits = (q[:, part] * q.shape[-1] ** -0.5) @ k[:, part].transpose(-1, -2)
        p = (logits + masked[:, part] + bias).softmax(-1)
        parts.append(p.to(v.dtype) @ v[:, part])
    return torch.cat(parts, 1)


def triangle_attention_core(t: Inputs) -> Tensor:
    """[1, N, H, N, D]."""
    return core(t["q"], t["k"], t["v"], t["bias"], t["keep"])


def triangle_attention(t: Inputs, starting: bool = True, attend: Callable[..., Tensor] = core):
    """z + update; `attend` has the arguments of `core`."""
    z, mask = t["z"], t["mask"]
    x, keep = (z, mask) if starting else (z.transpose(1, 2), mask.transpose(1, 2))
    x = _normed(x, t, "norm")
    heads = t["bias"].shape[0]
    q, k, v = (F.linear(x, t[n]).unflatten(-1, (heads, -1)).transpose(2, 3) for n in "qkv")
    bias = F.linear(x, t["bias"]).permute(0, 3, 1, 2)[:, None]
    o = attend(q, k, v, bias, keep > 0).transpose(2, 3).flatten(-2)
    update = F.linear(F.linear(x, t["g"]).sigmoid() * o, t["o"])
    return z + (update if starting else update.transpose(1, 2))


def triangle_multiplication(t: Inputs, outgoing: bool = True) -> Tensor:
    """z + update."""
    z = t["z"]
    x = _normed(z, t, "norm_in")
    p = F.linear(x, t["p_in"]) * F.linear(x, t["g_in"]).sigmoid() * t["mask"][..., None]
    a, b = wide(p).chunk(2, -1)
    o = torch.einsum("bikd,bjkd->bijd" if outgoing else "bkid,bkjd->bijd", a, b)
    o = _normed(o, t, "norm_out").to(z.dtype)
    return z + F.linear(o, t["p_out"]) * F.linear(x, t["g_out"]).sigmoid()


def transition(t: Inputs) -> Tensor:
    """x + update."""
    x = _normed(t["x"], t, "norm")
    return t["x"] + F.linear(F.silu(F.linear(x, t["fc1"])) * F.linear(x, t["fc2"]), t["fc3"])


def pair_bias_attention(t: Inputs) -> Tensor:
    """[G0, G1, H, I, D]; float32 throughout, as stock has it for tokens and atoms."""
    q, k, v, bias = (wide(t[n]) for n in ("q", "k", "v", "bias"))
    with torch.autocast(q.device.type, enabled=False):
        logits = torch.einsum("gshid,gshkd->gshik", q, k) * q.shape[-1] ** -0.5 + bias
        if "keep" in t:
            logits = logits + (1 - wide(t["keep"].to(q.dtype)))[:, :, None, None] * -1e6
        o = torch.einsum("gshik,gshkd->gshid", logits.softmax(-1), v)
    return o.to(t["v"].dtype)


def outer_product_mean(t: Inputs) -> Tensor:
    """z + update, four of the 32 channels of `a` at a time."""
    a, b, weight = t["a"], t["b"], t["weight"]
    count = t["count"].clamp(min=1)[..., None]
    d, out = b.shape[-1], t["z"] + t["bias"]
    for lo in range(0, d, OPM_CHUNK):
        o = torch.einsum("bsic,bsjd->bijcd", a[..., lo : lo + OPM_CHUNK], b)
        o = (o.flatten(-2) / count).to(a.dtype)
        out = out + F.linear(o, weight[:, lo * d : (lo + OPM_CHUNK) * d])
    return out


def pair_weighted_averaging(t: Inputs) -> Tensor:
    """m + update [1, S, N, C_m]."""
    m, z = _normed(t["m"], t, "norm_m"), _normed(t["z"], t, "norm_z")
    heads = t["proj_z"].shape[0]
    v = F.linear(m, t["proj_m"]).unflatten(-1, (heads, -1)).permute(0, 3, 1, 2, 4)
    logits = F.linear(z, t["proj_z"]).permute(0, 3, 1, 2)
    o = torch.einsum("bhij,bhsjd->bhsid", logits.softmax(-1).to(v.dtype), v)
    o = o.permute(0, 2, 3, 1, 4).flatten(-2)
    return t["m"] + F.linear(F.linear(m, t["proj_g"]).sigmoid() * o, t["proj_o"])


def token_bias(t: Inputs) -> Tensor:
    """[1, 24 * 16, N, N]: per layer a LayerNorm of its own and a projection."""
    parts = []
    for gain, shift, w in zip(
        t["gains"], t["shifts"], t["weight"].chunk(len(t["gains"])), strict=True
    ):
        layer = {"n_weight": gain, "n_bias": shift}
        parts.append(F.linear(_normed(t["z"], layer, "n"), w))
    return torch.cat(parts, -1).permute(0, 3, 1, 2)


def relative_position(t: Inputs) -> Tensor:
    """[1, N, N, C]: one-hot vectors times a Linear, as in AlphaFold 3, Algorithm 3."""

    def pairs(name: str) -> tuple[Tensor, Tensor]:
        return t[name][:, None], t[name][None, :]

    def same(name: str) -> Tensor:
        a, b = pairs(name)
        return a == b

    def offset(name: str, reach: int, where: Tensor) -> Tensor:
        a, b = pairs(name)
        return torch.where(where, (a - b + reach).clip(0, 2 * reach), 2 * reach + 1)

    chain, entity = same("chain"), same("entity")
    residue = offset("residue", 32, chain)
    token = offset("token", 32, chain & same("residue"))
    copy = offset("copy", 2, entity)  # Boltz-2: chains of one entity
    dtype = t["weight"].dtype
    hot = [F.one_hot(residue, 66), F.one_hot(token, 66), entity[..., None], F.one_hot(copy, 6)]
    return F.linear(torch.cat([x.to(dtype) for x in hot], -1), t["weight"])[None]


def adaptive_norm(t: Inputs) -> Tensor:
    """LayerNorm without parameters, times the conditioning's scale, plus its shift."""
    a = F.layer_norm(wide(t["a"]), t["a"].shape[-1:]).to(t["a"].dtype)
    return t["scale"] * a + t["shift"]


def _expected(logits: Tensor, t: Inputs) -> Tensor:
    return (wide(logits).softmax(-1) * t["centres"].to(wide(logits).dtype)).sum(-1)


def pae_head(t: Inputs) -> Tensor:
    """Expected error [1, N, N] in angstrom."""
    return _expected(F.linear(t["z"], t["weight"]), t)


def pde_head(t: Inputs) -> Tensor:
    """As `pae_head`, of z + its transpose."""
    return _expected(F.linear(t["z"] + t["z"].transpose(1, 2), t["weight"]), t)


def distogram_head(t: Inputs) -> Tensor:
    """Probability [1, N, N] of the first bins (a contact), of z + its transpose."""
    logits = F.linear(t["z"] + t["z"].transpose(1, 2), t["weight"], t["bias"])
    return wide(logits).softmax(-1)[..., :CONTACT_BINS].sum(-1)


EAGER: dict[str, Function] = {
    "triangle_attention_core": triangle_attention_core,
    "triangle_attention_core_masked": triangle_attention_core,
    "triangle_multiplication": triangle_multiplication,
    "triangle_multiplication_incoming": lambda t: triangle_multiplication(t, outgoing=False),
    "template_triangle_multiplication": triangle_multiplication,
    "triangle_attention": triangle_attention,
    "triangle_attention_ending": lambda t: triangle_attention(t, starting=False),
    "template_triangle_attention": triangle_attention,
    "transition_pair": transition,
    "transition_msa": transition,
    "transition_single": transition,
    "token_attention_diffusion": pair_bias_attention,
    "token_attention_trunk": pair_bias_attention,
    "atom_attention": pair_bias_attention,
    "outer_product_mean": outer_product_mean,
    "pair_weighted_averaging": pair_weighted_averaging,
    "token_bias": token_bias,
    "relative_position": relative_position,
    "adaptive_norm": adaptive_norm,
    "pae_head": pae_head,
    "pde_head": pde_head,
    "distogram_head": distogram_head,
}


def multiplication_weights(t: Inputs) -> TriangleMultiplicationWeights:
    """The weights among the inputs, as foldcp_kernels takes them."""
    names = TriangleMultiplicationWeights.__dataclass_fields__
    return TriangleMultiplicationWeights(*(t[name] for name in names))


def attention_weights(t: Inputs) -> TriangleAttentionWeights:
    """The weights among the inputs, as foldcp_kernels takes them."""
    names = [n for n in TriangleAttentionWeights.__dataclass_fields__ if n != "heads"]
    return TriangleAttentionWeights(*(t[name] for name in names), t["bias"].shape[0])


def transition_weights(t: Inputs) -> TransitionWeights:
    """The weights among the inputs, as foldcp_kernels takes them."""
    return TransitionWeights(*(t[name] for name in TransitionWeights.__dataclass_fields__))


# Definitions that were written apart from the functions above.
_DEFINED: dict[Function, Function] = {
    triangle_multiplication: lambda t: reference.triangle_multiplication(
        t["z"], t["mask"], multiplication_weights(t), True
    ),
    triangle_attention: lambda t: reference.triangle_attention(
        t["z"], t["mask"], attention_weights(t), True
    ),
    EAGER["triangle_multiplication_incoming"]: lambda t: reference.triangle_multiplication(
        t["z"], t["mask"], multiplication_weights(t), False
    ),
    EAGER["triangle_attention_ending"]: lambda t: reference.triangle_attention(
        t["z"], t["mask"], attention_weights(t), False
    ),
    transition: lambda t: reference.transition(t["x"], transition_weights(t)),
}


def truth(op: str) -> Function:
    """The definition of an op, to be run on float64 tensors."""
    return _DEFINED.get(EAGER[op], EAGER[op])
