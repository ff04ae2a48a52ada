"""Count the live bytes of each stage of a prediction, with no GPU.

A model of shapes runs on a fake CUDA device: 2 pairformer blocks, 1 MSA block and 1 confidence
block, because depth adds no memory, but all token layers, whose biases are kept. Activations are
counted, weights are not. Peers of a mesh do not exist.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from foldcp.boltz.families.dry_run.device import LiveBytes, fake_cuda
from foldcp.boltz.families.dry_run.features import features
from foldcp.boltz.families.dry_run.mesh import fake_mesh
from foldcp.boltz.families.dry_run.model import onto, shapes_of_model
from foldcp.boltz.families.swap import apply
from foldcp.layout import strategies
from foldcp.layout.cuts import chunks
from foldcp.modules.settings import Settings
from foldcp.planner.workload import Setup, Workload
from foldcp_kernels.core.chunking import set_chunk_bytes, spans
from foldcp_kernels.core.dispatch import default_impl, set_impl

STEPS = 2  # of the sampler

# Modules whose chunk loops only write into tensors that exist already.
_IN_PLACE_LOOPS = (
    "foldcp_kernels.attention.weighted", "foldcp_kernels.core.chunking",
    "foldcp_kernels.norm_linear", "foldcp_kernels.outer_product_mean",
    "foldcp_kernels.relative_position",
    "foldcp_kernels.transition", "foldcp_kernels.triangle_multiplication.parts",
    "foldcp.modules.model",
    "foldcp.modules.atoms.encoder", "foldcp.modules.diffusion.conditioning",
    "foldcp.modules.confidence.module", "foldcp.modules.trunk.msa",
)  # fmt: skip

# (stage, owner, method)
STAGES: tuple[tuple[str, Callable[[Any], Any], str], ...] = (
    ("input_embedder", lambda m: m.input_embedder, "forward"),
    ("recycling", lambda m: m.predict_step.fold, "_recycle_pair"),
    ("templates", lambda m: getattr(m, "template_module", None), "forward"),
    ("msa", lambda m: m.msa_module, "forward"),
    ("pairformer", lambda m: m.pairformer_module, "forward"),
    ("distogram", lambda m: m.distogram_module, "contact_probability"),
    ("conditioning", lambda m: m.predict_step.fold.conditioner, "forward"),
    ("sampling", lambda m: m.structure_module, "sample"),
    ("confidence", lambda m: m.confidence_module, "forward"),
)


@dataclass(frozen=True)
class StagePeak:
    """The peak of one stage: bytes, bytes / N^2, and the largest storages at that moment."""

    stage: str
    bytes: int
    per_pair: float
    at_peak: tuple[tuple[int, str], ...] = ()


def measure(
    n: int = 2048,
    rows: int = 1,
    cols: int = 1,
    rank: int = 0,
    samples: int = 1,
    sequences: int = 1,
    explain: bool = False,
    few: bool = True,
    chunk: int | None = None,
    recycles: int = 1,
    kernels: str = "torch",
    kind: str = "boltz2",
    memory: str = "fast",
    atoms: int | None = None,
    together: int | None = None,
    **choices: Any,
) -> list[StagePeak]:
    """Predict on one rank and count each stage's peak.

    Args:
        n: tokens.
        rows: rows of the mesh.
        cols: columns of the mesh.
        rank: this rank.
        samples: diffusion samples.
        sequences: rows of the MSA.
        explain: also list what was alive at each peak.
        few: see `few_chunks`.
        chunk: bytes of one chunk, None for the default of a GPU.
        recycles: recycling steps, which do not change the peak.
        kernels: implementation of the local ops, "torch" or "triton" (fused kernels allocate their
            outputs as on a GPU; nothing is launched).
        kind: "boltz2" under bfloat16 autocast, or "boltz1" in float32.
        memory: "fast" or "lean", see `foldcp.fabric.policy.Policy`.
        atoms: as of `features`.
        together: samples that are computed at once, None for all.
        **choices: other choices of the policy, "auto" where there are none.

    Returns:
        One entry per stage, in order, then "between" (what runs outside of them) and "overall".
    """
    model: Any = deepcopy(shapes_of_model(kind))
    real = features(n, sequences, atoms=atoms)
    loops = few_chunks() if few else nullcontext()
    with fake_cuda() as device, loops, _setting(chunk, kernels), taken_as_finite():
        torch.set_autocast_enabled("cuda", kind != "boltz1")
        onto(model, device)
        apply(model, fake_mesh(rows, cols, rank, "cuda", memory=memory, **choices))
        weights = device.live.now
        device.live.note = birth if explain else None
        feats = {name: device.known(value) for name, value in real.items()}
        settings = Settings(recycles, STEPS, samples, max_parallel_samples=together)
        peaks = _peaks(model, device.live, lambda: model.predict_step.fold(feats, settings))
    peaks["overall"] = max(peaks.values())
    return [
        StagePeak(k, b - weights, (b - weights) / n**2, notes) for k, (b, notes) in peaks.items()
    ]


@contextmanager
def few_chunks() -> Iterator[None]:
    """Run only the first two and the last chunk of loops that write into memory they were given.

    All chunks of such a loop need the same memory, and at 2,048 tokens there are thousands.
    """

    def few(every: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
        return every if len(every) <= 3 else (*every[:2], every[-1])

    def some(total: int, length: int) -> Iterator[tuple[int, int]]:
        yield from few(list(spans(total, length)))

    with ExitStack() as stack:
        lines = mock.patch.object(strategies, "chunks", lambda *cut: few(chunks(*cut)))
        stack.enter_context(lines)
        for module in _IN_PLACE_LOOPS:
            stack.enter_context(mock.patch.object(import_module(module), "spans", some))
        yield


@contextmanager
def taken_as_finite() -> Iterator[None]:
    """Let coordinates without values count as finite: a prediction asks once, at its end."""
    with mock.patch.object(torch, "isfinite", lambda _: torch.ones((), dtype=torch.bool)):
        yield


@contextmanager
def _setting(chunk: int | None, kernels: str) -> Iterator[None]:
    before = default_impl()
    set_chunk_bytes(chunk)
    set_impl(kernels)
    try:
        yield
    finally:
        set_chunk_bytes(None)
        set_impl(before)


def _peaks(
    model: Any, live: LiveBytes, run: Callable[[], Any]
) -> dict[str, tuple[int, tuple[tuple[int, str], ...]]]:
    peaks: dict[str, tuple[int, tuple[tuple[int, str], ...]]] = {}

    def close(name: str) -> None:
        peaks[name] = max(peaks.get(name, (0, ())), (live.peak, tuple(live.at_peak)))
        live.restart()

    for name, owner, method in STAGES:
        if owner(model) is not None:
            _watch(owner(model), method, name, close)
    live.restart()
    run()
    close("between")
    return peaks


def _watch(owner: Any, method: str, name: str, close: Callable[[str], None]) -> None:
    inner = getattr(owner, method)

    def outer(*args: Any, **kwargs: Any) -> Any:
        close("between")
        out = inner(*args, **kwargs)
        close(name)
        return out

    setattr(owner, method, outer)


def birth(x: Tensor) -> str:
    """Describe a tensor: shape, dtype and the lines of foldcp that made it."""
    lines: list[str] = []
    frame: FrameType | None = sys._getframe()
    while frame is not None and len(lines) < 4:
        path = frame.f_code.co_filename
        if "/foldcp" in path and "/dry_run/" not in path:
            lines.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        frame = frame.f_back
    return f"{str(x.dtype)[6:]}{list(x.shape)} {' < '.join(lines)}"


def exact_stage_bytes(workload: Workload, setup: Setup, rank: int) -> dict[str, int]:
    """Count the live bytes of each stage on a rank by running it on shapes, weights apart.

    Templates are left out.

    Args:
        workload: the input and what is asked of it.
        setup: the mesh and its choices.
        rank: of the mesh.

    Returns:
        The bytes at the peak of each stage that the model has, and of "between", what runs outside
        of them.

    Raises:
        ValueError: z is not float32, which a run on shapes cannot change.
    """
    if setup.z_itemsize != 4:
        raise ValueError(
            f"`z_itemsize` is {setup.z_itemsize}: the exact count takes float32 z, 4; use "
            "`foldcp.planner.stage_memory.stage_bytes` for others"
        )
    found = measure(
        workload.tokens, setup.rows, setup.cols, rank, workload.samples, workload.sequences,
        chunk=setup.chunk_bytes, recycles=min(1, workload.recycling_steps), kernels="triton",
        kind=workload.model, memory=setup.memory, atoms=workload.atoms, together=workload.together,
        multiplication=setup.multiplication, attention=setup.attention, wire=setup.wire,
    )  # fmt: skip
    return {stage.stage: stage.bytes for stage in found if stage.stage != "overall"}
