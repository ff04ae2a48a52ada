"""How fast each op could be: bytes, operations and exponentials over what a chip does of each.

    floor of a kernel = max(bytes / bandwidth, flops / tensor rate, exps / exp rate)
    floor of an op    = sum over the kernels it needs at least

An op that contracts over all of N cannot be one kernel: triangle multiplication needs three
(planes, contraction, output), triangle attention likewise. Each kernel reads its inputs and writes
its outputs once; weights are not counted.

    python -m bench.roofline         # bench/results/roofline.csv, no GPU needed
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import l2
from bench import shapes as s
from bench.machine import ROOT, write_csv

OUT = ROOT / "bench" / "results" / "roofline.csv"
MODELLED_CHIPS = ("H100", "H200")
SIZES = (256, 512, 1024, 2048, 4096)
EXP_PER_CLOCK = 16  # ex2.approx per SM and clock on sm_80 to sm_100 (CUDA programming guide)
FLOAT32 = 4
# What we predict of our kernels, as a fraction of the floor, by what bounds them. Attention: the
# best published kernel reaches 0.56 of the exp bound (2.06 ms against 1.16). Memory and tensor:
# usual for a fused elementwise kernel and for cuBLAS batched products. Assumptions, not results.
EXPECTED = {"memory": 0.80, "tensor": 0.80, "exp": 0.55}


@dataclass(frozen=True)
class Chip:
    """Rates of one chip.

    Args:
        name: part of what the driver calls it.
        sms: multiprocessors.
        clock_ghz: under load.
        tflops: dense bf16/fp16 with float32 accumulation.
        float32_tflops: without tensor cores.
        tbs: memory bandwidth, TB/s.
        l2_mb: of L2.
        source: "measured" or "datasheet", of tflops and tbs.
    """

    name: str
    sms: int
    clock_ghz: float
    tflops: float
    float32_tflops: float
    tbs: float
    l2_mb: int
    source: str = "datasheet"

    def tensor_rate(self, operand_bytes: int) -> float:
        """Flop/s of matrix products; float32 is three TF32 passes where that is faster."""
        if operand_bytes == 2:
            return self.tflops * 1e12
        return max(self.float32_tflops, self.tflops / 2 / 3) * 1e12

    def exp_rate(self) -> float:
        """Exponentials per second."""
        return EXP_PER_CLOCK * self.sms * self.clock_ghz * 1e9


# The first whose name is part of the driver's name is taken.
CHIPS: tuple[Chip, ...] = (
    # NVIDIA A100 80GB SXM datasheet (2021): 312 TFLOP/s, 19.5, 2,039 GB/s; whitepaper: 1.41 GHz
    Chip("A100", 108, 1.41, 312, 19.5, 2.039, 40),
    # Measured on one machine, 2026-11-13: 8192^3 bf16 product 798, device copy 3.0 TB/s
    # (datasheet: 989 and 3.35); float32 67 of the datasheet, clock as in ANCHORS.md.
    Chip("H100", 132, 1.755, 798, 67, 3.0, 50, "measured"),
    # Measured on three machines, 2026-10/11: 769 to 798 TFLOP/s and 4.3 TB/s (datasheet: 989, 4.8).
    Chip("H200", 132, 1.755, 790, 67, 4.3, 50, "measured"),
    # NVIDIA DGX B200 datasheet per GPU: 2.25 PFLOP/s dense, 8 TB/s, float32 80; boost 1.965 GHz.
    Chip("B200", 148, 1.965, 2250, 80, 8.0, 126),
    # NVIDIA Ada whitepaper: 165.2 (fp32 accumulate), 82.6, 1,008 GB/s, 128 SM, 2.52 GHz
    Chip("4090", 128, 2.52, 165.2, 82.6, 1.008, 72),
    # NVIDIA RTX Blackwell whitepaper: 209.5 (fp32 accumulate), 104.8, 1,792 GB/s, 170 SM, 2.407 GHz
    Chip("5090", 170, 2.407, 209.5, 104.8, 1.792, 96),
    # NVIDIA RTX Blackwell PRO whitepaper: 503.8 dense, 125, 1,792 GB/s, 188 SM, 2.617 GHz
    Chip("RTX PRO 6000", 188, 2.617, 503.8, 125, 1.792, 128),
)


def chip_named(gpu: str) -> Chip | None:
    """The chip of a driver's device name ("NVIDIA H100 80GB HBM3"), None when unknown."""
    return next((chip for chip in CHIPS if chip.name.lower() in gpu.lower()), None)


@dataclass(frozen=True)
class Kernel:
    """Work of one kernel: operations of matrix products, bytes moved, exponentials."""

    flops: float = 0
    bytes: float = 0
    exps: float = 0

    def parts_ms(self, chip: Chip, operand_bytes: int) -> dict[str, float]:
        """Milliseconds that each of the three would take alone."""
        return {
            "memory": 1e3 * self.bytes / (chip.tbs * 1e12),
            "tensor": 1e3 * self.flops / chip.tensor_rate(operand_bytes),
            "exp": 1e3 * self.exps / chip.exp_rate(),
        }


def attention(groups: int, heads: int, i: int, k: int, d: int, biases: int, e: int) -> Kernel:
    """Attention of `groups` sets of i queries to k keys, with `biases` bias sets of [H, i, k]."""
    logits = groups * heads * i * k
    moved = groups * heads * (2 * i + 2 * k) * d + biases * heads * i * k
    return Kernel(4 * logits * d, moved * e, logits)


def _multiplication(n: int, c: int, e: int) -> list[Kernel]:
    pairs = n * n
    return [
        Kernel(2 * pairs * c * 4 * c, pairs * 3 * c * e),  # z -> a, b
        Kernel(2 * pairs * n * c, pairs * 3 * c * e),  # a, b -> x
        Kernel(2 * pairs * c * 2 * c, pairs * 3 * c * e),  # x, z -> z
    ]


def _attention(n: int, c: int, e: int) -> list[Kernel]:
    pairs, hd = n * n, s.HEADS * s.HEAD_DIM
    return [
        Kernel(2 * pairs * c * (3 * hd + s.HEADS), pairs * (c + 3 * hd + s.HEADS) * e),
        attention(n, s.HEADS, n, n, s.HEAD_DIM, 1, e),
        Kernel(2 * pairs * 2 * c * hd, pairs * (hd + 2 * c) * e),  # the gate is computed again
    ]


def _transition(rows: int, c: int, e: int) -> list[Kernel]:
    # silu takes one exponential per hidden channel.
    return [Kernel(2 * rows * c * 4 * c * 3, 2 * rows * c * e, rows * 4 * c)]


def _outer_product_mean(n: int, seqs: int, e: int) -> list[Kernel]:
    d2, pairs = s.OPM_DIM**2, n * n
    flops = 2 * pairs * (seqs * d2 + d2 * s.PAIR)
    moved = 2 * seqs * n * s.OPM_DIM * e + pairs * (2 * s.PAIR * e + FLOAT32)
    return [Kernel(flops, moved)]


def _averaging(n: int, seqs: int, e: int) -> list[Kernel]:
    h, c, rows, pairs = s.AVERAGING_HEADS, s.MSA, seqs * n, n * n
    hd = h * s.OPM_DIM
    return [
        Kernel(2 * pairs * s.PAIR * h, pairs * (s.PAIR + h) * e, pairs * h),  # z -> weights
        Kernel(2 * rows * c * hd, rows * (c + hd) * e),  # m -> v
        Kernel(2 * rows * n * hd + 4 * rows * c * hd, (rows * (hd + 2 * c) + pairs * h) * e,
               rows * hd),
    ]  # fmt: skip


def _pair_head(n: int, e: int) -> list[Kernel]:
    pairs = n * n
    return [Kernel(2 * pairs * s.PAIR * s.BINS, pairs * (s.PAIR * e + FLOAT32), pairs * s.BINS)]


def kernels(
    op: str, n: int, operand_bytes: int, sequences: int = s.SEQUENCES["cuda"]
) -> list[Kernel]:
    """The kernels an op needs at least.

    Args:
        op: name in `bench.shapes.OPS`.
        n: tokens.
        operand_bytes: of one element.
        sequences: rows of the MSA.

    Raises:
        ValueError: there is no such op.
    """
    e, windows = operand_bytes, n * s.ATOMS_PER_TOKEN // s.QUERIES
    table = {
        "triangle_attention_core": lambda: [attention(n, s.HEADS, n, n, s.HEAD_DIM, 1, e)],
        "triangle_attention_core_masked": lambda: [attention(n, s.HEADS, n, n, s.HEAD_DIM, 1, e)],
        "triangle_multiplication": lambda: _multiplication(n, s.PAIR, e),
        "triangle_multiplication_incoming": lambda: _multiplication(n, s.PAIR, e),
        "template_triangle_multiplication": lambda: _multiplication(n, s.TEMPLATE, e),
        "triangle_attention": lambda: _attention(n, s.PAIR, e),
        "triangle_attention_ending": lambda: _attention(n, s.PAIR, e),
        "template_triangle_attention": lambda: _attention(n, s.TEMPLATE, e),
        "transition_pair": lambda: _transition(n * n, s.PAIR, e),
        "transition_msa": lambda: _transition(sequences * n, s.MSA, e),
        "transition_single": lambda: _transition(n, s.SINGLE, e),
        "token_attention_diffusion": lambda: [
            attention(s.SAMPLES, s.TOKEN_HEADS, n, n, s.DIFFUSION_DIM, 1, e)
        ],
        "token_attention_trunk": lambda: [attention(1, s.TOKEN_HEADS, n, n, s.TRUNK_DIM, 1, e)],
        "atom_attention": lambda: [
            attention(windows * s.SAMPLES, s.HEADS, s.QUERIES, s.KEYS, s.HEAD_DIM, windows, e)
        ],
        "token_bias": lambda: [
            Kernel(2 * n * n * s.PAIR * s.LAYERS * s.TOKEN_HEADS,
                   n * n * (s.PAIR + s.LAYERS * s.TOKEN_HEADS) * e)
        ],
        "outer_product_mean": lambda: _outer_product_mean(n, sequences, e),
        "pair_weighted_averaging": lambda: _averaging(n, sequences, e),
        "pae_head": lambda: _pair_head(n, e),
        "pde_head": lambda: _pair_head(n, e),
        "distogram_head": lambda: _pair_head(n, e),
        "adaptive_norm": lambda: [Kernel(0, (2 * s.SAMPLES + 2) * n * s.TOKEN * e)],
        "relative_position": lambda: [Kernel(0, n * n * s.PAIR * e)],
    }  # fmt: skip
    if op not in table:
        raise ValueError(f"`op` must be one of {', '.join(table)}, got {op!r}")
    return table[op]()


@dataclass(frozen=True)
class Floor:
    """Least time of an op on a chip: `ms` in all, `bound` by what takes the most of it."""

    ms: float
    bound: str
    parts: dict[str, float]


def floor(op: str, n: int, operand_bytes: int, chip: Chip, sequences: int = 1024) -> Floor:
    """The floor of an op; see the top of the file."""
    parts = dict.fromkeys(("memory", "tensor", "exp"), 0.0)
    for kernel in kernels(op, n, operand_bytes, sequences):
        alone = kernel.parts_ms(chip, operand_bytes)
        bound = max(alone, key=alone.__getitem__)
        parts[bound] += alone[bound]
    return Floor(sum(parts.values()), max(parts, key=parts.__getitem__), parts)


def predicted_ms(least: Floor) -> float:
    """What we expect of our kernels: each part at its `EXPECTED` fraction of the floor."""
    return sum(ms / EXPECTED[bound] for bound, ms in least.parts.items())


# op -> N -> (at most, aim) in ms on an H100 in bf16: the targets of issue 3.
TARGETS = {
    "triangle_attention_core": {1024: (2.8, 2.06), 2048: (21.6, 15.2)},
    "triangle_multiplication": {1024: (1.34, 1.11), 2048: (6.55, 5.9)},
}
# op -> N -> (best published, best published in Triton) in ms on an H100 in bf16: FlashPairformer
# (uplifting-biomolecular-modeling, 2026), as listed in this project's ANCHORS.
PUBLISHED = {
    "triangle_attention_core": {
        512: (0.310, 0.379), 1024: (2.06, 2.80), 2048: (15.2, 21.6), 4096: (130.0, 179.0)
    },
    "triangle_multiplication": {512: (0.277, 0.342), 1024: (1.108, 1.34), 2048: (5.88, 6.55)},
}  # fmt: skip


def rows(chips: tuple[str, ...] = MODELLED_CHIPS, sizes: tuple[int, ...] = SIZES) -> list[dict]:
    """The table of predictions in bf16, one row per op, N and chip."""
    found: list[dict[str, Any]] = []
    for op in s.OPS:
        for n in sizes:
            for chip in (c for c in CHIPS if c.name in chips):
                least = floor(op, n, 2, chip)
                at_most, aim = TARGETS.get(op, {}).get(n, ("", ""))
                best, triton = PUBLISHED.get(op, {}).get(n, ("", ""))
                work = kernels(op, n, 2)
                on_h100 = chip.name == "H100"
                found.append(
                    {"op": op, "n": n, "dtype": "bf16", "chip": chip.name, "rates": chip.source}
                    | {"gflop": round(sum(k.flops for k in work) / 1e9, 3)}
                    | {"mb_moved": round(sum(k.bytes for k in work) / 1e6, 3)}
                    | l2.memory_gb(op, n, chip.sms, chip.l2_mb)
                    | {"giga_exps": round(sum(k.exps for k in work) / 1e9, 4)}
                    | {f"{k}_ms_modelled": f"{v:.4g}" for k, v in least.parts.items()}
                    | {"roofline_ms_modelled": f"{least.ms:.4g}", "bound_modelled": least.bound}
                    | {"predicted_ms_modelled": f"{predicted_ms(least):.4g}"}
                    | {"target_at_most_ms": at_most if on_h100 else ""}
                    | {"target_aim_ms": aim if on_h100 else ""}
                    | {"flashpairformer_ms_published": best if on_h100 else ""}
                    | {"best_triton_ms_published": triton if on_h100 else ""}
                )
    return found


def main(argv: list[str] | None = None) -> int:
    """Write the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.roofline")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(argv)
    table = rows()
    write_csv(options.out, table)
    for row in table:
        if row["target_at_most_ms"] != "":
            print(
                f"{row['op']} N={row['n']} on {row['chip']}: floor {row['roofline_ms_modelled']} ms"
                f" ({row['bound_modelled']}), predicted {row['predicted_ms_modelled']}, target "
                f"{row['target_at_most_ms']}, aim {row['target_aim_ms']}"
            )
    print(f"{len(table)} rows in {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
