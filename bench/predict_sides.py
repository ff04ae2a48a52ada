"""The sides of bench.predict in one process: stock, stock with kernels, foldcp; run and checked.

The check compares a side with stock in float32 on a model of few blocks and of the same dimensions:
coordinates after superposition, over the structure's radius of gyration, and pLDDT. A side may be
FACTOR times as far off as stock in plain torch is in the precision that is timed, plus a floor. (64
untrained blocks blow rounding up until no error can be told from it.)
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from bench.machine import ROOT
from bench.predict import CHECK, FAILED, Row, Run
from bench.timing import MIB

# Boltz's default looks for contact constraints in every sampling step; this chain has none, and
# the features here lack what that search reads. Off on both sides.
STEERING = {"contact_guidance_update": False}
# (pairformer blocks, MSA blocks, confidence blocks, recycles, sampling steps) and N of the check.
CHECK_DEPTH = {"cuda": (2, 1, 1, 1, 20), "cpu": (1, 1, 1, 0, 2)}
CHECK_N = {"cuda": 250, "cpu": 18}  # no multiple of what a kernel or window takes at a time
FACTOR = 3.0
FLOORS = {"cuda": {"structure": 5e-3, "plddt": 2e-3}, "cpu": {"structure": 1e-4, "plddt": 1e-5}}
GROWTH = 2.0  # a run takes about N to this power: to tell whether one more fits the time


def superposed(a: Tensor, b: Tensor) -> float:
    """RMSD of two structures [A, 3] after the best superposition, over the second's gyration."""
    a, b = (x.double() - x.double().mean(0) for x in (a, b))
    u, s, vt = torch.linalg.svd(a.T @ b)
    s[-1] *= torch.sign(torch.det(u @ vt))  # rotations only
    square = (a.square().sum() + b.square().sum() - 2 * s.sum()).clamp(min=0) / len(a)
    return float((square / b.square().sum(-1).mean()).sqrt())


class Sides:
    """Models of one process, by depth and whether foldcp runs them."""

    def __init__(self, options: argparse.Namespace, sides: set[str]) -> None:
        sys.path.insert(0, str(ROOT / "tests/support"))
        self.options, self.sides = options, sides
        self.kind = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(self.kind)
        self._models: dict[tuple[int, ...], dict[bool, Any]] = {}
        self._truth: tuple[dict[str, Tensor], dict[str, float]] | None = None

    def depth(self, check: bool) -> tuple[int, int, int]:
        """Pairformer, MSA and confidence blocks."""
        o = self.options
        real = (o.blocks, o.msa_blocks, o.confidence_blocks)
        return CHECK_DEPTH[self.kind][:3] if check else real

    def model(self, side: str, check: bool) -> Any:
        """The model of a side; of one depth at a time, as several do not leave room for a run."""
        from foldcp.boltz.families.swap import apply
        from foldcp.fabric.mesh import Mesh

        depth = self.depth(check)
        if depth not in self._models:
            self._models.clear()
            stock = self._built(depth)
            # The chain has no template, and stock would spend time on embedding that.
            stock.use_templates = False
            self._models[depth] = {False: stock.to(self.device)}
        models = self._models[depth]
        ours = side == "foldcp"
        if ours and True not in models:
            shared = check or len(self.sides) > 1
            models[True] = copy.deepcopy(models[False]) if shared else models[False]
            mesh = Mesh.create(1, 1, self.device)
            apply(models[True], mesh, "bf16" if self.kind == "cuda" else "fp32")
        models[ours].use_kernels = side == "stock-kernels"
        return models[ours]

    def _built(self, depth: tuple[int, int, int]) -> Any:
        import parity

        try:  # a CPU takes half a minute to draw 507 M weights
            with torch.device(self.device):
                return parity.build_model("real", *depth, steering=STEERING)
        except RuntimeError as error:
            print(f"the weights are drawn on the CPU: {error}", flush=True)
            return parity.build_model("real", *depth, steering=STEERING)

    def predict(
        self, n: int, side: str, check: bool, recycles: int, steps: int, low: bool = True
    ) -> dict[str, Tensor]:
        """What `predict_step` returns; `low`: in the precision that is timed, not in float32."""
        import parity

        from foldcp.boltz.families.dry_run.features import features
        from foldcp.boltz.features.dense import dense_view

        model = self.model(side, check)
        torch.manual_seed(0)
        feats = {name: x.to(self.device) for name, x in features(n).items()}
        if side != "foldcp":
            view = dense_view(feats)
            feats = {name: view[name] for name in view}
        low = low and self.kind == "cuda"
        precision = torch.autocast("cuda", dtype=torch.bfloat16) if low else nullcontext()
        settings = dict(recycling=recycles, steps=steps, samples=self.options.samples)
        with precision:
            out = parity.stock_outputs(model, feats, **settings)
        # What Boltz's predict_step turns out-of-memory errors into.
        if "coords" not in out or out.get("exception"):
            raise torch.OutOfMemoryError("predict_step ran out of memory")
        real = feats["atom_pad_mask"][0].bool()
        coords = out["coords"].float().reshape(-1, len(real), 3)
        return {"coords": coords[:, real], "plddt": out["plddt"].float()}

    def check(self, side: str) -> Row:
        """How far a side is from stock in float32, and how far it may be."""
        n, (recycles, steps) = CHECK_N[self.kind], CHECK_DEPTH[self.kind][3:]
        if self._truth is None:
            truth = self.predict(n, "stock", True, recycles, steps, low=False)
            plain = self.predict(n, "stock", True, recycles, steps)
            self._truth = truth, self._errors(plain, truth)
        truth, allowed = self._truth
        found = self._errors(self.predict(n, side, True, recycles, steps), truth)
        row: Row = {"status": "ok"}
        for name, error in found.items():
            bound = FACTOR * allowed[name] + FLOORS[self.kind][name]
            row |= {name: error, f"{name}_bound": bound}
            if not error <= bound:
                said = f"{name} is {error:.2e} off stock's in float32; at most {bound:.2e} expected"
                row |= {"status": "wrong", "reason": said}
        return row

    def _errors(self, out: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
        return {
            "structure": superposed(out["coords"][0], truth["coords"][0]),
            "plddt": float((out["plddt"] - truth["plddt"]).abs().mean()),
        }

    def timed(self, n: int, side: str) -> Row:
        """Seconds, peak memory beyond what is allocated before, mean distance from the origin."""
        o, cuda, before = self.options, self.kind == "cuda", 0
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        out = self.predict(n, side, False, o.recycles, o.steps)
        if cuda:
            torch.cuda.synchronize()
        row: Row = {"status": "ok", "seconds": time.perf_counter() - start}
        if cuda:
            row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / MIB
        coords = out["coords"]
        distance = (coords - coords.mean(-2, keepdim=True)).norm(dim=-1)
        return row | {"checksum": float(distance.mean())}


def expected(n: int, side: str, done: list[Row]) -> float:
    """Seconds that a run should take by its side's largest run so far; 0 where there is none."""
    times = [(r["n"], r["seconds"]) for r in done if r["side"] == side and "seconds" in r]
    if not times:
        return 0.0
    size, seconds = max(times)
    return seconds * max(1.0, n / size) ** GROWTH


def worker(options: argparse.Namespace, runs: list[Run]) -> Iterator[Row]:
    """Do runs in order and yield a row for each; one that would not end in time is skipped."""
    sides = Sides(options, {side for _, side, _ in runs})
    done: list[Row] = []
    warm: set[tuple[int, str]] = set()
    wrong: dict[str, Row] = {}
    for n, side, k in runs:
        row: Row = {"n": n, "side": side, "round": k}
        if side in wrong:  # no time is wanted of it
            row |= wrong[side]
        elif options.end and time.time() + expected(n, side, done) > options.end:
            row |= {"status": "skipped", "reason": "no time left"}
        else:
            row |= _attempt(sides, n, side, k, options.warm_up and (n, side) not in warm)
            warm.add((n, side))
            if k == CHECK and row["status"] != "ok":
                wrong[side] = {key: row[key] for key in ("status", "reason")}
        done.append(row)
        yield row


def _attempt(sides: Sides, n: int, side: str, k: int, warm_up: bool) -> Row:
    try:
        if k == CHECK:
            return sides.check(side)
        if warm_up:  # compiled kernels and cuBLAS's choices stay out of the times
            sides.predict(n, side, False, 0, 4)
        return sides.timed(n, side)
    except torch.OutOfMemoryError:
        if sides.kind == "cuda":
            torch.cuda.empty_cache()
        return {"status": "oom", "reason": "out of device memory"}
    except Exception as error:  # one run must not end the others
        said = (str(error).strip() or repr(error)).splitlines()[0]
        return {"status": FAILED, "reason": said[:300]}
