"""What a first session on a GPU checks, why, and how one case is checked.

An op is compared with its float64 definition; it may be twice as wrong as stock's torch in the same
precision, plus what rounding of a result explains (gradients three times). `auto` must then give
Triton's result to the bit. A graph case records work as a CUDA graph, or has a recording fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import eager
from bench.kernels import relative_error
from bench.providers import FOLDCP
from bench.shapes import OPS, Draw, Inputs, cast

SEQUENCES = 64  # deep enough for every block of sequences, and few enough for float64
FORWARD, BACKWARD = 2.0, 3.0
# Of the largest value of an update: two roundings in the dtype; float32 products on tensor cores
# are three TF32 ones.
FLOORS = {"boltz": 8e-3, "bf16": 8e-3, "fp32": 2e-5}
# name -> (dtype of tensors, dtype of products under autocast)
MODES: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "boltz": (torch.float32, torch.bfloat16),
    "bf16": (torch.bfloat16, None),
    "fp32": (torch.float32, None),
}
# On a CPU in Triton's interpreter, whose bfloat16 products are wrong.
INTERPRETED: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "boltz": (torch.float32, torch.float16),
    "bf16": (torch.float16, None),
    "fp32": (torch.float32, None),
}
# No fused kernel takes these: what runs is torch, whatever is asked for.
WITHOUT_KERNEL = ("transition_single",)
TRIANGLE = (
    "triangle_multiplication", "triangle_multiplication_incoming", "triangle_attention",
    "triangle_attention_ending",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One case.

    Args:
        kind: "op", "gradient" or "graph".
        what: the op, or which graph case.
        mode: of `MODES`, "" of a graph.
        n: tokens, 0 of a graph.
    """

    kind: str
    what: str
    mode: str = ""
    n: int = 0

    @property
    def name(self) -> str:
        """As in the table: "op transition_pair boltz 256"."""
        return " ".join(str(x) for x in (self.kind, self.what, self.mode, self.n) if x)


@dataclass(frozen=True)
class Group:
    """Cases that are there for one reason, the most valuable group first.

    Args:
        kind: see `Case`.
        whats: see `Case`.
        mode: see `Case`.
        n: see `Case`.
        reason: for having them.
    """

    kind: str
    whats: tuple[str, ...]
    mode: str
    n: int
    reason: str

    def cases(self) -> Iterator[Case]:
        """The cases."""
        return (Case(self.kind, what, self.mode, self.n) for what in self.whats)


EVEN, ODD = 256, 131
GROUPS = (
    Group("op", tuple(OPS), "boltz", EVEN, "what `boltz predict` launches (float32 under bf16 "
          "autocast), at an N that blocks and 16-byte loads divide: predict and block need these"),
    Group("graph", ("replay", "random", "failed"), "", 0,
          "the sampler replays recordings, and goes on where one fails: predict needs it"),
    Group("op", tuple(OPS), "boltz", ODD, "the same where blocks are cut short and rows are not "
          "aligned, which compiles to other code"),
    Group("op", tuple(OPS), "bf16", EVEN, "what bench.kernels and bench.tune time"),
    Group("gradient", TRIANGLE, "bf16", ODD, "the backward kernels, ends of blocks masked"),
    Group("op", tuple(OPS), "bf16", ODD, "bf16 pointers that are 2-byte aligned only"),
    Group("op", tuple(OPS), "fp32", ODD, "FOLDCP_PRECISION=fp32 and the diffusion step: three TF32 "
          "products in place of one, smaller blocks"),
    Group("op", tuple(OPS), "fp32", EVEN, "the same where 16-byte loads are taken"),
    Group("gradient", TRIANGLE, "fp32", EVEN, "the backward kernels in float32"),
)  # fmt: skip
# A rehearsal on a CPU: each kind of check once, in seconds.
FAST = (
    Group("op", ("triangle_multiplication", "transition_single"), "boltz", 9, "autocast"),
    Group("graph", ("failed",), "", 0, "left out without a GPU"),
    Group("op", ("pae_head", "relative_position"), "fp32", 9, "float32"),
    Group("gradient", ("triangle_attention",), "bf16", 6, "gradients"),
)


class LeftOut(Exception):
    """A case that cannot be checked here; the message says why."""


def check(case: Case, device: torch.device) -> dict[str, Any]:
    """Check one case.

    Args:
        case: which.
        device: a GPU, or a CPU with Triton's interpreter.

    Returns:
        `status` ("ok" or "wrong"), `error` and `bound` where it has them, `reason`.

    Raises:
        LeftOut: it cannot be checked on this device.
    """
    if case.kind == "graph":
        if device.type != "cuda":
            raise LeftOut("needs a GPU")
        from bench.gpu import graph_cases

        reason = getattr(graph_cases, case.what)(device)
        return {"status": "wrong" if reason else "ok", "reason": reason or ""}
    return {"op": _check_op, "gradient": _check_gradient}[case.kind](case, device)


def _draw(case: Case, device: torch.device) -> tuple[Inputs, torch.dtype | None]:
    dtype, low = (MODES if device.type == "cuda" else INTERPRETED)[case.mode]
    draw = Draw(dtype, device, seed=1)
    draw.sequences = SEQUENCES if device.type == "cuda" else 3
    return OPS[case.what].make(draw, case.n), low


def _autocast(device: torch.device, low: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device.type, dtype=low, enabled=low is not None)


def _impl(case: Case) -> str | None:
    return None if case.what in WITHOUT_KERNEL else "triton"


@torch.no_grad()
def _check_op(case: Case, device: torch.device) -> dict[str, Any]:
    (t, low), residual = _draw(case, device), OPS[case.what].residual
    base = None if residual is None else t[residual].clone()
    truth = eager.truth(case.what)(cast(t, torch.float64))

    def run(call: Callable[[], Tensor]) -> Tensor:
        with _autocast(device, low):
            out = call()
        if base is not None and out.data_ptr() == t[residual].data_ptr():
            out = out.clone()
            t[residual].copy_(base)  # it was changed in place
        return out

    def error(out: Tensor) -> float:
        return relative_error(out, truth, base)

    allowed = error(run(lambda: eager.EAGER[case.what](t)))
    bound = FORWARD * allowed + FLOORS[case.mode]
    mine = run(FOLDCP[case.what](t, _impl(case)))
    found = {"error": error(mine), "bound": bound, "status": "ok", "reason": ""}
    if not found["error"] <= bound:
        return found | {"status": "wrong", "reason": _beyond(found["error"], bound)}
    if device.type == "cuda" and not torch.equal(run(FOLDCP[case.what](t, "auto")), mine):
        return found | {"status": "wrong", "reason": "`auto` gives other bits than Triton"}
    return found


def _check_gradient(case: Case, device: torch.device) -> dict[str, Any]:
    t, low = _draw(case, device)
    names = [k for k, x in t.items() if x.is_floating_point() and "mask" not in k]
    dout: list[Tensor] = []

    def gradients(values: Inputs, call: Callable[[Inputs], Tensor]) -> list[Tensor]:
        leaves = values | {k: values[k].detach().clone().requires_grad_() for k in names}
        with torch.enable_grad(), _autocast(device, low):
            out = call(leaves)
        if not dout:
            g = torch.Generator().manual_seed(2)
            dout.append(torch.randn(out.shape, generator=g, dtype=torch.float64).to(device))
        return list(torch.autograd.grad(out, [leaves[k] for k in names], dout[0].to(out.dtype)))

    want = gradients(cast(t, torch.float64), eager.truth(case.what))
    plain = gradients(t, eager.EAGER[case.what])
    mine = gradients(t, lambda leaves: FOLDCP[case.what](leaves, "triton")())
    # A gradient that cancels to nearly nothing is as exact as what cancels.
    least = 0.3 * max(float(x.abs().max()) for x in want)
    worst = {"error": 0.0, "bound": 0.0, "status": "ok", "reason": ""}
    for name, a, b, c in zip(names, mine, want, plain, strict=True):
        size = max(float(b.abs().max()), least)
        error, allowed = (float((x.double() - b).abs().max()) / size for x in (a, c))
        bound = BACKWARD * allowed + FLOORS[case.mode]
        if not error <= bound:
            return {"error": error, "bound": bound, "status": "wrong",
                    "reason": f"gradient of {name}: {_beyond(error, bound)}"}  # fmt: skip
        if error >= worst["error"]:
            worst |= {"error": error, "bound": bound}
    return worst


def _beyond(error: float, bound: float) -> str:
    return f"error {error:.2e}; at most {bound:.2e} expected"
