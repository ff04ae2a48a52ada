"""Sampling steps with and without a CUDA graph: the same numbers, no wait in a step, and the time.

    python -m bench.gpu.graph                    # one GPU, the real dimensions
    python -m bench.gpu.graph --n 24 --layers 2  # a rehearsal; a CPU has no graphs

Without a graph, steps run under torch's own watch for synchronisation, where one is an error. Both
ways must give the same coordinates bit for bit, twice, and leave the generator alike. A time is the
difference between two numbers of steps, so that what is done once is not in it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.block import LAYERS, DiffusionStep, padded, randomised
from bench.machine import results_folder, write_csv
from bench.shapes import SINGLE, TOKEN_HEADS
from bench.timing import MIB
from foldcp.layout import AtomLayout
from foldcp.mesh import Mesh
from foldcp.modules.diffusion_conditioning import DiffusionConditioning
from foldcp.modules.sampler import AtomDiffusion
from foldcp.modules.step_graph import set_graphs

SIZES = {"cuda": "128,512,1024", "cpu": "24"}
FEW, MANY = 12, 36  # steps


class Sampler:
    """The sampler of one chain of N tokens on one device, on random weights and conditioning."""

    def __init__(self, n: int, layers: int, device: torch.device) -> None:
        from boltz.model.modules.diffusionv2 import AtomDiffusion as Stock

        from bench.live_memory import features

        self.device, self.mesh = device, Mesh.create(1, 1, device)
        parts = DiffusionStep(device, layers)
        depth = dict(
            atom_encoder_depth=3, atom_encoder_heads=4, token_transformer_depth=layers,
            token_transformer_heads=TOKEN_HEADS, atom_decoder_depth=3, atom_decoder_heads=4,
        )  # fmt: skip
        windows = dict(atoms_per_window_queries=32, atoms_per_window_keys=128)
        stock = Stock(dict(token_s=SINGLE, atom_s=128, **windows, **depth))
        self.sampler = AtomDiffusion(randomised(stock).to(device), self.mesh)
        self.sampler.alignment_reverse_diff = True  # as `boltz predict` sets it
        s_inputs, s, z, relpos, noisy = parts.inputs(n)
        feats = {name: x.to(device) for name, x in features(n).items()}
        layout, atoms = self.mesh.layout(n), AtomLayout(noisy.shape[1] // 32, 1, 0)
        s_inputs, s = padded(s_inputs, layout, 1), padded(s, layout, 1)
        z, relpos = padded(z, layout, 1, 2), padded(relpos, layout, 1, 2)
        with torch.no_grad():
            made = DiffusionConditioning(parts.conditioning, self.mesh)(
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

        set_graphs(graphs)
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


def run(sampler: Sampler, n: int, samples: int, modes: tuple[str, ...]) -> dict[str, Any]:
    """Check and time one case; its row."""
    row: dict[str, Any] = {"n": n, "samples": samples, "status": "ok", "reason": ""}
    first: Tensor | None = None
    try:
        for mode in modes:
            sampler(mode, 4, samples)  # kernels are compiled
            if sampler.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            found, few = sampler(mode, FEW, samples)
            name = "graph" if mode == "1" else "eager"
            if not found.isfinite().all():
                raise ValueError(f"{name}: not finite")
            for again in (found, sampler(mode, FEW, samples)[0]):
                first = again if first is None else first
                if not torch.equal(again, first):
                    off = float((again - first).abs().max())
                    raise ValueError(f"{name}: coordinates differ by {off:.1e} from the first run")
            each = (sampler(mode, MANY, samples)[1] - few) / (MANY - FEW)
            row[f"{name}_ms"] = round(1e3 * each, 4)
            if sampler.device.type == "cuda":
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
    for n in (int(x) for x in options.n.split(",")):
        sampler = Sampler(n, options.layers, device)
        for samples in (int(x) for x in options.samples.split(",")):
            row = run(sampler, n, samples, modes)
            rows.append({"n": n, "samples": samples} | {c: row.get(c, "") for c in columns} | row)
            print(rows[-1], flush=True)
            write_csv(options.out / "graph.csv", rows)
    set_graphs("auto")
    return int(any(r["status"] != "ok" for r in rows))


if __name__ == "__main__":
    raise SystemExit(main())
