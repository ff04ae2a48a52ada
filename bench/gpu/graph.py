"""Sampling steps and blocks with and without a CUDA graph: the same numbers, no wait, and the time.

    python -m bench.gpu.graph                    # one GPU, the real dimensions
    python -m bench.gpu.graph --n 24 --layers 2  # a rehearsal; a CPU has no graphs

Without a graph, they run under torch's own watch for synchronisation, where one is an error. Both
ways must give the same numbers bit for bit, twice, and leave the generator alike. A time is the
difference between two numbers of steps (of passes through a stack, per block), so that what is done
once, recording included, is not in it.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.block import LAYERS, DiffusionStep, padded, randomised
from bench.machine import results_folder, write_csv
from bench.shapes import PAIR, SINGLE, TOKEN_HEADS
from bench.timing import MIB
from foldcp.boltz.families import boltz2_options
from foldcp.fabric.mesh import Mesh
from foldcp.layout.tiles import AtomLayout
from foldcp.modules.diffusion.conditioning import DiffusionConditioning
from foldcp.modules.diffusion.sampler import AtomDiffusion
from foldcp.modules.graphs.block_graph import Fixed, recorded, run_blocks
from foldcp.modules.trunk.masks import stack_masks
from foldcp.modules.trunk.msa import MSAModule
from foldcp.modules.trunk.pairformer import PairformerModule

SIZES = {"cuda": "128,512,1024", "cpu": "24"}
FEW, MANY = 12, 36  # steps
PASSES = (2, 6)  # through a stack
# Blocks of a stack. The trunk has 64 of the pairformer, the confidence module 8 of the same kind.
BLOCKS = {"pairformer": 8, "msa": 4}
SEQUENCES = 128


class Sampler:
    """The sampler of one chain of N tokens on one device, on random weights and conditioning."""

    def __init__(self, n: int, layers: int, device: torch.device) -> None:
        from boltz.model.modules.diffusionv2 import AtomDiffusion as Stock

        from foldcp.boltz.families.dry_run.features import features

        self.device, self.mesh = device, Mesh.create(1, 1, device)
        parts = DiffusionStep(device, layers)
        depth = dict(
            atom_encoder_depth=3, atom_encoder_heads=4, token_transformer_depth=layers,
            token_transformer_heads=TOKEN_HEADS, atom_decoder_depth=3, atom_decoder_heads=4,
        )  # fmt: skip
        windows = dict(atoms_per_window_queries=32, atoms_per_window_keys=128)
        stock = Stock(dict(token_s=SINGLE, atom_s=128, **windows, **depth))
        stock.alignment_reverse_diff = True  # as `boltz predict` sets it
        options = boltz2_options.sampler(stock)
        self.sampler = AtomDiffusion(randomised(stock).to(device), self.mesh, options)
        s_inputs, s, z, relpos, noisy = parts.inputs(n)
        feats = {name: x.to(device) for name, x in features(n).items()}
        layout, atoms = self.mesh.layout(n), AtomLayout(noisy.shape[1] // 32, 1, 0)
        s_inputs, s = padded(s_inputs, layout, 1), padded(s, layout, 1)
        z, relpos = padded(z, layout, 1, 2), padded(relpos, layout, 1, 2)
        with torch.no_grad():
            options = boltz2_options.diffusion_conditioning(parts.conditioning)
            made = DiffusionConditioning(parts.conditioning, self.mesh, options)(
                s, z, lambda lo, hi: relpos[:, lo:hi], feats, layout, atoms
            )
        self.shared = (made, s_inputs, s, feats, layout, atoms)

    def __call__(self, graphs: str, steps: int, samples: int) -> tuple[Tensor, float]:
        """(coordinates and then one number of the generator, seconds)."""
        cuda = self.device.type == "cuda"
        watch = cuda and graphs == "0"

        def progress(done: int, total: int) -> None:
            if watch:
                torch.cuda.set_sync_debug_mode("error" if done < total else "default")

        self.mesh.policy = replace(self.mesh.policy, graphs=graphs)
        torch.manual_seed(0)
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        try:
            coords = self.sampler.sample(
                *self.shared, num_sampling_steps=steps, multiplicity=samples, progress=progress
            )
        finally:
            if watch:
                torch.cuda.set_sync_debug_mode("default")
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return torch.cat([coords.flatten(), torch.rand(1, device=self.device)]), seconds


class Stack:
    """A stack of blocks of N tokens on random weights: of the pairformer, or of the MSA module."""

    def __init__(self, part: str, n: int, device: torch.device) -> None:
        from boltz.model.layers.pairformer import PairformerModule as Pairformer
        from boltz.model.modules.trunkv2 import MSAModule as Msa

        self.device, self.mesh, self.blocks = device, Mesh.create(1, 1, device), BLOCKS[part]
        self.layout = self.mesh.layout(n)
        draw = torch.Generator().manual_seed(n)
        s, z = (torch.randn(x, generator=draw) for x in ((1, n, SINGLE), (1, n, n, PAIR)))
        if part == "msa":
            stock = Msa(64, PAIR, SINGLE, self.blocks, 0.15, 0.25)
            stock = randomised(stock).to(device)
            self.stack = MSAModule(stock, self.mesh, boltz2_options.msa(stock))
            m = torch.randn((1, SEQUENCES, n, 64), generator=draw)
            tensors, ones = (z, m), torch.ones((1, SEQUENCES, n), device=device)
            self.fixed: Fixed = (*stack_masks(self.layout, self.mesh)[:2], ones)
        else:
            stock = Pairformer(SINGLE, PAIR, self.blocks, TOKEN_HEADS, v2=True)
            self.stack = PairformerModule(randomised(stock).to(device), self.mesh)
            tensors, self.fixed = (s, z), stack_masks(self.layout, self.mesh)
        self.tensors = tuple(x.to(device) for x in tensors)

    def __call__(self, graphs: str, passes: int, _: int = 0) -> tuple[Tensor, float]:
        """(what the stack makes and then one number of the generator, seconds)."""
        cuda = self.device.type == "cuda"
        self.mesh.policy = replace(self.mesh.policy, graphs=graphs)
        torch.manual_seed(0)
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=cuda):
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            with recorded(self.mesh):
                for i in range(passes):
                    if cuda and graphs == "0" and i:
                        torch.cuda.set_sync_debug_mode("error")
                    try:
                        # The same input in each pass: values neither grow nor settle.
                        state = tuple(x.clone() for x in self.tensors)
                        state = run_blocks(self.stack.layers, state, self.fixed, self.layout)
                    finally:
                        if cuda:
                            torch.cuda.set_sync_debug_mode("default")
            if cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        parts = [x.float().flatten() for x in state]
        return torch.cat([*parts, torch.rand(1, device=self.device)]), seconds


def run(
    case: Sampler | Stack, row: dict[str, Any], modes: tuple[str, ...], counts: tuple[int, int, int]
) -> dict[str, Any]:
    """Check and time one case; its row.

    Args:
        case: runs it.
        row: its name.
        modes: of FOLDCP_GRAPHS.
        counts: a first, a small and a large number of steps or passes.
    """
    row = row | {"status": "ok", "reason": ""}
    samples, (warm, few_steps, many_steps) = row["samples"] or 1, counts
    each_of = getattr(case, "blocks", 1)
    first: Tensor | None = None
    try:
        for mode in modes:
            case(mode, warm, samples)  # kernels are compiled
            if case.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            found, few = case(mode, few_steps, samples)
            name = "graph" if mode == "1" else "eager"
            if not found.isfinite().all():
                raise ValueError(f"{name}: not finite")
            for again in (found, case(mode, few_steps, samples)[0]):
                first = again if first is None else first
                if not torch.equal(again, first):
                    off = float((again - first).abs().max())
                    raise ValueError(f"{name}: numbers differ by {off:.1e} from the first run")
            took = case(mode, many_steps, samples)[1] - few
            row[f"{name}_ms"] = round(1e3 * took / (many_steps - few_steps) / each_of, 4)
            if case.device.type == "cuda":
                row[f"{name}_peak_mib"] = round(torch.cuda.max_memory_allocated() / MIB, 1)
    except (RuntimeError, ValueError) as error:
        row |= {"status": "wrong", "reason": (str(error).strip() or repr(error)).splitlines()[0]}
    return row


def main(argv: list[str] | None = None) -> int:
    """Run all cases and write the table; 1 when one is wrong."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.graph")
    parser.add_argument("--n", default=SIZES[device.type])
    parser.add_argument("--samples", default="1,5")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the token transformer")
    parser.add_argument("--out", type=Path, default=results_folder())
    options = parser.parse_args(argv)
    try:
        import boltz.model.modules.diffusionv2  # noqa: F401
    except ImportError as error:
        print(f"bench.gpu.graph needs Boltz, which is not importable here: {error}")
        return 0
    modes = ("0", "1") if device.type == "cuda" else ("0",)
    columns = ("eager_ms", "graph_ms", "eager_peak_mib", "graph_peak_mib")
    rows = []

    def add(row: dict[str, Any]) -> None:
        first = {k: row[k] for k in ("part", "n", "samples")}
        rows.append(first | {c: row.get(c, "") for c in columns} | row)
        print(rows[-1], flush=True)
        write_csv(options.out / "graph.csv", rows)

    for n in (int(x) for x in options.n.split(",")):
        sampler = Sampler(n, options.layers, device)
        for samples in (int(x) for x in options.samples.split(",")):
            row = {"part": "step", "n": n, "samples": samples}
            add(run(sampler, row, modes, (4, FEW, MANY)))
        del sampler
        for part in BLOCKS:
            row = {"part": f"{part} block", "n": n, "samples": ""}
            add(run(Stack(part, n, device), row, modes, (2, *PASSES)))
    return int(any(r["status"] != "ok" for r in rows))


if __name__ == "__main__":
    raise SystemExit(main())
