"""Live bytes of each stage of a prediction, in units of N^2, with no GPU.

Boltz-2 in its real dimensions is built from shapes alone and runs on a fake CUDA device under
bfloat16 autocast (`synthetic.device`): 2 pairformer blocks, 1 MSA block and 1 confidence block,
because depth adds no memory, but all 24 token layers, whose biases are kept. Activations are
counted, weights are not. Peers of a mesh do not exist (`synthetic.mesh`).

    python -m bench.live_memory                  # bench/results/memory/live.csv
    python -m bench.live_memory --mesh 1x1 --explain
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import boltz.main
import torch
from boltz.model.layers import initialize
from boltz.model.models.boltz1 import Boltz1
from boltz.model.models.boltz2 import Boltz2
from torch import Tensor, nn

from bench.machine import ROOT, write_csv
from bench.synthetic.checkpoint import hyperparameters
from bench.synthetic.device import FakeDevice, fake_cuda
from bench.synthetic.mesh import fake_mesh
from foldcp.boltz.families.swap import apply
from foldcp.layout import strategies
from foldcp.layout.cuts import chunks
from foldcp.modules.settings import Settings
from foldcp_kernels.core.chunking import set_chunk_bytes, spans
from foldcp_kernels.core.dispatch import default_impl, set_impl

TOKENS, ATOMS_PER_TOKEN, STEPS = 2048, 8, 2
BLOCKS, MSA_BLOCKS, CONFIDENCE_BLOCKS = 2, 1, 1
BYTES_PER_PAIR, SHARE_OF_2X2 = 2000, 0.26
OUT = ROOT / "bench" / "results" / "memory" / "live.csv"

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


def features(n: int, sequences: int = 1, chains: int = 1) -> dict[str, Tensor]:
    """Collated compact features of protein chains: N tokens, 8 atoms each, no template."""
    atoms = n * ATOMS_PER_TOKEN
    windows = -(-atoms // 32) * 32
    token = torch.arange(n)
    chain = token * chains // n
    pad = torch.zeros(windows)
    pad[:atoms] = 1
    of_atom = torch.zeros(windows, dtype=torch.long)
    of_atom[:atoms] = torch.arange(atoms) // ATOMS_PER_TOKEN
    first = token * ATOMS_PER_TOKEN
    none = torch.zeros(n, dtype=torch.long)
    feats = {
        "token_index": token, "residue_index": token, "asym_id": chain, "entity_id": chain,
        "sym_id": none, "mol_type": none, "method_feature": none, "modified": none,
        "res_type": 2 + token % 20, "token_pad_mask": torch.ones(n),
        "cyclic_period": torch.zeros(n), "affinity_token_mask": torch.zeros(n),
        "token_bond_index": torch.zeros(0, 2, dtype=torch.long),
        "token_bond_type": torch.zeros(0, dtype=torch.long),
        "contact_index": torch.zeros(0, 2, dtype=torch.long),
        "contact_type": torch.zeros(0, dtype=torch.long),
        "contact_threshold_value": torch.zeros(0), "contact_default": torch.tensor(0),
        "ref_pos": torch.randn(windows, 3), "ref_charge": torch.zeros(windows),
        "ref_element": 6 * pad.long(),
        "ref_atom_name_chars": torch.zeros(windows, 4, dtype=torch.long),
        "atom_backbone_feat": torch.zeros(windows, dtype=torch.long), "ref_space_uid": of_atom,
        "atom_pad_mask": pad, "atom_to_token": of_atom, "token_to_rep_atom": first + 1,
        "frames_idx": (first[:, None] + torch.arange(3))[None],
        "msa": (2 + token % 20).to(torch.uint8).expand(sequences, n).contiguous(),
        "msa_paired": torch.zeros(sequences, n), "msa_mask": torch.ones(sequences, n).bool(),
        "has_deletion": torch.zeros(sequences, n).bool(),
        "deletion_value": torch.zeros(sequences, n), "deletion_mean": torch.zeros(n),
        "profile": torch.zeros(n, 33), "template_mask": torch.zeros(1, n), "pocket_feature": none,
    }  # fmt: skip
    return {name: value[None] for name, value in feats.items()}


def shallow_model() -> dict[str, Any]:
    """Constructor arguments of Boltz-2 in its real dimensions with as few blocks as peaks need."""
    arguments = hyperparameters("real")
    arguments["confidence_model_args"]["pairformer_args"]["num_blocks"] = CONFIDENCE_BLOCKS
    return arguments | dict(
        pairformer_args=asdict(boltz.main.PairformerArgsV2(num_blocks=BLOCKS)),
        msa_args=asdict(boltz.main.MSAModuleArgs(msa_blocks=MSA_BLOCKS, subsample_msa=True)),
        diffusion_process_args=asdict(boltz.main.Boltz2DiffusionParams()),
        steering_args=None,
        ema=False,
        use_kernels=False,
    )


def shallow_boltz1() -> dict[str, Any]:
    """The same for Boltz-1, whose confidence module repeats the trunk."""
    msa = boltz.main.MSAModuleArgs(
        msa_blocks=MSA_BLOCKS, subsample_msa=True, use_paired_feature=False
    )
    return hyperparameters("real", "boltz1") | dict(
        pairformer_args=asdict(boltz.main.PairformerArgs(num_blocks=BLOCKS)),
        msa_args=asdict(msa),
        diffusion_process_args=asdict(boltz.main.BoltzDiffusionParams()),
        steering_args=None,
        ema=False,
        use_kernels=False,
    )


@lru_cache
def shapes_of_model(kind: str = "boltz2") -> nn.Module:
    """Boltz-2, or "boltz1", without memory for its parameters."""
    # Stock draws truncated normals with SciPy, which shapes do not need.
    with mock.patch.object(initialize, "trunc_normal_init_"), torch.device("meta"):
        model = Boltz1(**shallow_boltz1()) if kind == "boltz1" else Boltz2(**shallow_model())
        return model.eval().requires_grad_(False)


def onto(model: nn.Module, device: FakeDevice) -> None:
    """Give every parameter and buffer a fake tensor on the device, in place; none is counted."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                fake = torch.empty(p.shape, dtype=p.dtype, device="cuda")
                module._parameters[name] = nn.Parameter(fake, requires_grad=False)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device="cuda")


def measure(
    n: int = TOKENS,
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
) -> list[StagePeak]:
    """Predict on one rank and report each stage's peak.

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

    Returns:
        One entry per stage, in order, then "between" (what runs outside of them) and "overall".
    """
    model, real = deepcopy(shapes_of_model(kind)), features(n, sequences)
    loops = few_chunks() if few else nullcontext()
    with fake_cuda() as device, loops, _setting(chunk, kernels), taken_as_finite():
        torch.set_autocast_enabled("cuda", kind != "boltz1")
        onto(model, device)
        apply(model, fake_mesh(rows, cols, rank, "cuda", memory=memory))
        weights = device.live.now
        device.live.note = birth if explain else None
        feats = {name: device.known(value) for name, value in real.items()}
        peaks: dict[str, tuple[int, tuple]] = {}

        def close(name: str) -> None:
            live = device.live
            peaks[name] = max(peaks.get(name, (0, ())), (live.peak - weights, tuple(live.at_peak)))
            live.restart()

        for name, owner, method in STAGES:
            if owner(model) is not None:
                _watch(owner(model), method, name, close)
        device.live.restart()
        settings = Settings(recycles, sampling_steps=STEPS, diffusion_samples=samples)
        model.predict_step.fold(feats, settings)
        close("between")
    peaks["overall"] = max(peaks.values())
    return [StagePeak(k, b, b / n**2, notes) for k, (b, notes) in peaks.items()]


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
    """Coordinates without values count as finite: a prediction asks once, after its last step."""
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


def _watch(owner: Any, method: str, name: str, close: Callable[[str], None]) -> None:
    inner = getattr(owner, method)

    def outer(*args: Any, **kwargs: Any) -> Any:
        close("between")
        out = inner(*args, **kwargs)
        close(name)
        return out

    setattr(owner, method, outer)


def birth(x: Tensor) -> str:
    """Shape, dtype and the lines of foldcp that made a tensor."""
    lines, frame = [], sys._getframe()
    while frame is not None and len(lines) < 4:
        if "/foldcp" in frame.f_code.co_filename:
            lines.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        frame = frame.f_back
    return f"{str(x.dtype)[6:]}{list(x.shape)} {' < '.join(lines)}"


def main(argv: list[str] | None = None) -> int:
    """Measure 1x1 and every rank of 2x2, write the table; 1 when a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.live_memory")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--mesh", nargs="+", default=["1x1", "2x2"])
    parser.add_argument("--kernels", nargs="+", default=["torch", "triton"])
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--explain", action="store_true", help="what is alive at each peak")
    parser.add_argument("--every-chunk", action="store_true", help="see `few_chunks`; minutes")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(argv)
    rows = []
    ranks = [
        (kernels, mesh, rank)
        for kernels in options.kernels
        for mesh in options.mesh
        for rank in range(_size(mesh))
    ]
    for kernels, mesh, rank in ranks:
        r, c = (int(x) for x in mesh.split("x"))
        found = measure(
            options.tokens, r, c, rank, options.samples, options.sequences, options.explain,
            not options.every_chunk, kernels=kernels,
        )  # fmt: skip
        for peak in found:
            rows.append(
                {"kernels": kernels, "tokens": options.tokens, "samples": options.samples}
                | {"sequences": options.sequences, "mesh": mesh, "rank": rank}
                | {"stage": peak.stage, "bytes": peak.bytes}
                | {"bytes_per_pair": round(peak.per_pair, 1)}
            )
            print(f"{kernels} {mesh} rank {rank} {peak.stage:15} {peak.per_pair:8.1f} B x N^2")
            for size, note in peak.at_peak:
                print(f"    {size / options.tokens**2:8.1f}  {note}")
    write_csv(options.out, rows)
    return max(_judge([r for r in rows if r["kernels"] == k]) for k in options.kernels)


def _size(mesh: str) -> int:
    rows, cols = mesh.split("x")
    return int(rows) * int(cols)


def _judge(rows: list[dict[str, Any]]) -> int:
    one = {r["stage"]: r["bytes_per_pair"] for r in rows if r["mesh"] == "1x1"}
    many = [r["bytes_per_pair"] for r in rows if r["mesh"] == "2x2" and r["stage"] == "overall"]
    missed = [k for k, v in one.items() if v > BYTES_PER_PAIR]
    above = ", ".join(missed) or "none"
    print(f"{rows[0]['kernels']}: stages of 1x1 above {BYTES_PER_PAIR} bytes x N^2: {above}")
    if one and many:
        share = max(many) / one["overall"]
        print(f"2x2: largest rank {share:.3f} of 1x1 (target {SHARE_OF_2X2})")
        return int(bool(missed) or share > SHARE_OF_2X2)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
