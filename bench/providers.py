"""Who computes an op: foldcp's implementations, stock's torch, torch.compile, and other packages.

A provider turns the inputs of one case into a callable without arguments, with all conversions of
layout and dtype done beforehand. One that cannot run says why (`Unavailable`): the package is not
importable, or it does not have this op.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from bench import eager
from bench.shapes import Inputs

Call = Callable[[], Tensor]
OTHER_OP = "the package does not have this op"


class Unavailable(Exception):
    """A provider cannot run a case; the message says why."""


def autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Autocast in the dtype of a low-precision tensor, as stock Boltz runs."""
    low = x.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(x.device.type, dtype=x.dtype if low else None, enabled=low)


def main_input(t: Inputs) -> Tensor:
    """The first floating tensor of a case, which has its dtype and device."""
    return next(x for x in t.values() if x.is_floating_point())


def public(module: str, name: str) -> Callable[..., Any]:
    """A public function of foldcp_kernels.

    Raises:
        Unavailable: there is no such module or function, or it cannot be imported.
    """
    try:
        return getattr(import_module(f"foldcp_kernels.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"foldcp_kernels.{module}.{name} is not importable: {error}") from error


def _holes(mask: Tensor | None) -> Tensor | None:
    """A mask that drops something; None for one that keeps all, which foldcp's modules omit."""
    return None if mask is None or bool((mask > 0).all()) else mask


def _multiplication(t: Inputs, impl: str | None, outgoing: bool = True) -> Call:
    op = public("triangle_multiplication", "triangle_multiplication")
    w = eager.multiplication_weights(t)
    return lambda: op(t["z"], t["mask"], w, outgoing, impl=impl)


def _attention(t: Inputs, impl: str | None, starting: bool = True) -> Call:
    op, w = public("triangle_attention", "triangle_attention"), eager.attention_weights(t)
    mask = _holes(t["mask"])
    return lambda: op(t["z"], mask, w, starting, impl=impl)


def _attend(t: Inputs, impl: str | None) -> Call:
    op, scale = public("attention", "attend"), t["q"].shape[-1] ** -0.5
    keep = _holes(t.get("keep"))
    return lambda: op(t["q"], t["k"], t["v"], t["bias"], scale, keep, impl=impl)[0]


def _transition(t: Inputs, impl: str | None) -> Call:
    op, w = public("transition", "transition"), eager.transition_weights(t)
    return lambda: op(t["x"], w, impl=impl)


def _outer_product_mean(t: Inputs, impl: str | None) -> Call:
    op = public("outer_product_mean", "outer_product_mean")
    names = ("z", "a", "b", "count", "weight", "bias")
    return lambda: op(*(t[n] for n in names), impl=impl)


def _pair_weighted_averaging(t: Inputs, impl: str | None) -> Call:
    op = public("pair_weighted_averaging", "pair_weighted_averaging")
    norms = [t[f"norm_{x}_{y}"] for x in "mz" for y in ("weight", "bias")]
    matrices = [t[f"proj_{x}"] for x in "mgzo"]
    weights = public("pair_weighted_averaging", "PairWeightedAveragingWeights")
    w = weights(*norms, *matrices, len(t["proj_z"]))
    return lambda: op(t["m"], t["z"], w, impl=impl)


def _token_bias(t: Inputs, impl: str | None) -> Call:
    op = public("norm_linear", "norm_linear_planes")
    # The layers' gains and shifts go into one weight and bias, made once.
    weights = t["weight"].float().unflatten(0, (len(t["gains"]), -1))
    bias = (weights * t["shifts"].float()[:, None]).sum(-1).flatten().to(t["z"].dtype)
    weight = (weights * t["gains"].float()[:, None]).flatten(0, 1).to(t["z"].dtype)
    return lambda: op(t["z"], None, None, weight, bias, impl=impl)


def _adaptive_norm(t: Inputs, impl: str | None) -> Call:
    op = public("adaptive_norm", "adaptive_norm")
    return lambda: op(t["a"], t["scale"], t["shift"], impl=impl)


def _relative_position(t: Inputs, impl: str | None) -> Call:
    op = public("relative_position", "relative_position")
    tokens, positions = (public("relative_position", n) for n in ("Tokens", "Positions"))
    side = tokens(t["chain"].int(), t["residue"].int(), t["token"].int())
    firsts = torch.searchsorted(t["chain"], t["chain"].unique())
    classes = torch.stack([t[n][firsts] for n in ("chain", "entity", "copy")], 1).int()
    where = positions(side, side, classes, 32, 2, True)
    # The table holds what a pair's four one-hot vectors select, added up (Algorithm 3).
    w = t["weight"].float().T
    residue, token, entity, chain = w[:66], w[66:132], w[132], w[133:]
    place = torch.cat([residue + token[-1], residue[32] + token[:-1]])
    table = (torch.cat([chain, chain + entity])[:, None] + place).flatten(0, 1)
    table = table.to(t["weight"].dtype)
    return lambda: op(table, where, impl=impl)[None]


def _head(t: Inputs, impl: str | None, symmetric: bool, bins: int = 0) -> Call:
    op, z = public("binned_heads", "expected_values"), t["z"]
    other = z.transpose(1, 2) if symmetric else None
    values = t["centres"].float()[None]
    if bins:  # the probability of the first bins instead of a mean
        values = (torch.arange(values.shape[1], device=z.device) < bins).float()[None]
    return lambda: op(z, t["weight"], values, t.get("bias"), other, impl=impl)[0]


FOLDCP: dict[str, Callable[[Inputs, str | None], Call]] = {
    "triangle_attention_core": _attend,
    "triangle_attention_core_masked": _attend,
    "triangle_multiplication": _multiplication,
    "triangle_multiplication_incoming": functools.partial(_multiplication, outgoing=False),
    "template_triangle_multiplication": _multiplication,
    "triangle_attention": _attention,
    "triangle_attention_ending": functools.partial(_attention, starting=False),
    "template_triangle_attention": _attention,
    "transition_pair": _transition,
    "transition_msa": _transition,
    "transition_single": _transition,
    "token_attention_diffusion": _attend,
    "token_attention_trunk": _attend,
    "atom_attention": _attend,
    "outer_product_mean": _outer_product_mean,
    "pair_weighted_averaging": _pair_weighted_averaging,
    "token_bias": _token_bias,
    "adaptive_norm": _adaptive_norm,
    "relative_position": _relative_position,
    "pae_head": functools.partial(_head, symmetric=False),
    "pde_head": functools.partial(_head, symmetric=True),
    "distogram_head": functools.partial(_head, symmetric=True, bins=eager.CONTACT_BINS),
}


def foldcp(op: str, t: Inputs, impl: str | None = None) -> Call:
    """foldcp's op; changes its residual input in place."""
    if op not in FOLDCP:
        raise Unavailable(f"foldcp_kernels has no {op}")
    call = FOLDCP[op](t, impl)

    def run() -> Tensor:
        with torch.no_grad():
            return call()

    return run


def stock(op: str, t: Inputs) -> Call:
    """The op in plain torch as stock computes it."""
    function = eager.EAGER[op]

    def run() -> Tensor:
        with torch.no_grad(), autocast(main_input(t)):
            return function(t)

    return run


def compiled(op: str, t: Inputs) -> Call:
    """torch.compile of `stock`; the first call compiles."""
    torch._dynamo.reset()
    function = torch.compile(eager.EAGER[op], dynamic=False)

    def run() -> Tensor:
        with torch.no_grad(), autocast(main_input(t)):
            return function(t)

    try:
        run()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the compiler's toolchain raises
        raise Unavailable(f"torch.compile failed: {str(error).strip().splitlines()[0]}") from error
    return run


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except Exception as error:  # packages fail in many ways where there is no GPU
        raise Unavailable(f"{name} is not importable: {error!r}"[:200]) from error


def cuequivariance(op: str, t: Inputs) -> Call:
    """NVIDIA's cuequivariance_torch (0.13): masks are True = keep; residual added as Boltz does."""
    package = _package("cuequivariance_torch")
    _package("cuequivariance_ops_torch")  # which has the kernels
    if op.endswith(("triangle_multiplication", "triangle_multiplication_incoming")):
        weights = {k: v for k, v in t.items() if k not in ("z", "mask")}
        direction = "incoming" if op.endswith("incoming") else "outgoing"
        update = functools.partial(
            package.triangle_multiplicative_update, direction=direction, eps=1e-5, **weights
        )
        return _without_gradient(lambda: t["z"] + update(t["z"], mask=t["mask"]), t)

    def core(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, keep: Tensor) -> Tensor:
        mask = keep[:, :, None, None, :]
        return package.triangle_attention(q, k, v, bias, mask=mask, scale=q.shape[-1] ** -0.5)

    return _triangle_attention(op, t, core)


def trifast(op: str, t: Inputs) -> Call:
    """The Triton package trifast (0.1): [B, H, I, J, D], masks are True = masked."""
    package = _package("trifast")

    def core(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, keep: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        return package.triangle_attention(q, k, v, bias[:, 0], ~keep).transpose(1, 2)

    if op.startswith("triangle_attention_core"):  # layout and mask made once
        q, k, v = (t[x].transpose(1, 2).contiguous() for x in "qkv")
        bias, mask = t["bias"][:, 0].contiguous(), ~t["keep"]
        return _without_gradient(
            lambda: package.triangle_attention(q, k, v, bias, mask).transpose(1, 2), t
        )
    return _triangle_attention(op, t, core)


def _triangle_attention(op: str, t: Inputs, core: Callable[..., Tensor]) -> Call:
    """The core alone, or the whole op with Boltz's own projections around the core."""
    if op.startswith("triangle_attention_core"):
        inputs = [t[x] for x in ("q", "k", "v", "bias", "keep")]
        return _without_gradient(lambda: core(*inputs), t, cast=False)
    if "triangle_attention" not in op:
        raise Unavailable(OTHER_OP)
    starting = not op.endswith("ending")
    return _without_gradient(lambda: eager.triangle_attention(t, starting, core), t)


def _without_gradient(call: Call, t: Inputs, cast: bool = True) -> Call:
    def run() -> Tensor:
        with torch.no_grad(), autocast(main_input(t)) if cast else contextlib.nullcontext():
            return call()

    return run


PROVIDERS: dict[str, Callable[[str, Inputs], Call]] = {
    "foldcp": foldcp,
    "foldcp-torch": functools.partial(foldcp, impl="torch"),
    "eager": stock,
    "compile": compiled,
    "cuequivariance": cuequivariance,
    "trifast": trifast,
}
IN_PLACE = ("foldcp", "foldcp-torch")
# torch.compile on a CPU needs a C++ compiler and half a minute per case; name it to have it.
ON_CPU = ("foldcp", "foldcp-torch", "eager")
