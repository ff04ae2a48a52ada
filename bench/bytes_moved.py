"""Bytes that each rank moves in the triangle operations, against the plan and the lower bound.

Every rank of a mesh runs the operation on shapes alone, without the others (`synthetic.mesh`), so
what it posts is what it would send and receive. A tile is one 128-channel plane of a or b over the
pairs of one rank. The lower bound is that of ranks which compute their own tile: every element that
one needs and does not own, once; strategies that compute elsewhere go below it.

    python -m bench.bytes_moved                  # bench/results/traffic/triangle.csv
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.machine import ROOT, write_csv
from foldcp.boltz.families.dry_run.mesh import fake_mesh
from foldcp.fabric.exchange.autograd import Exchange
from foldcp.fabric.policy import STRATEGIES
from foldcp.fabric.transport.wire import part_bytes
from foldcp.layout.boxes import intersect, volume
from foldcp.layout.schedule import Piece
from foldcp.layout.tiles import PairLayout
from foldcp.rings.triangle_attention import triangle_attention
from foldcp.rings.triangle_multiplication import triangle_multiplication
from foldcp_kernels.attention.carry import Carry
from foldcp_kernels.triangle_attention import TriangleAttentionWeights
from foldcp_kernels.triangle_attention.parts import Lines
from foldcp_kernels.triangle_multiplication import TriangleMultiplicationWeights

MESHES = ((1, 2), (2, 1), (2, 2), (2, 3), (3, 3), (2, 4))
OPS = (
    "triangle_multiplication_outgoing", "triangle_multiplication_incoming",
    "triangle_attention_starting", "triangle_attention_ending",
)  # fmt: skip
CHANNELS, HEADS = 128, 4
OUT = ROOT / "bench" / "results" / "traffic" / "triangle.csv"


@dataclass
class Planned:
    """What the plans of all exchanges of one operation add up to, in bytes without gaps."""

    exchanges: int = 0
    sent: int = 0
    received: int = 0

    def add(self, exchange: Exchange) -> None:
        """Add one exchange."""

        def bytes_of(p: Piece) -> int:
            x, dims = exchange.sources[p.source], exchange.dims[p.source]
            elements = volume(p.box) * prod(n for d, n in enumerate(x.shape) if d not in dims)
            return part_bytes(elements, x.element_size(), exchange.wires[p.source] == "fp8")

        self.exchanges += 1
        for step in exchange.plan.steps:
            self.sent += sum(bytes_of(p) for p in step.sends)
            self.received += sum(bytes_of(p) for p in step.recvs)


def bound_tiles(op: str, layout: PairLayout) -> float:
    """Tiles that a rank needs and does not own, each element once.

    Args:
        op: one of `OPS`.
        layout: the tiling, of this rank.
    """
    rows, cols, every = layout.row_span(), layout.col_span(), (0, layout.padded)
    along = op.endswith(("outgoing", "starting"))
    one = (rows, every) if along else (every, cols)  # a, or k and v
    other = (cols, every) if along else (every, rows)  # b, or the bias
    weights = (1, 1) if "multiplication" in op else (2, HEADS / CHANNELS)
    own, total = layout.tile_box(), 0.0
    for box, weight in zip((one, other), weights, strict=True):
        held = intersect(box, own)
        total += weight * (volume(box) - (volume(held) if held else 0))
    return total / volume(own)


@contextmanager
def planned() -> Iterator[Planned]:
    """Add up the plans of all exchanges that are made inside."""
    total, make = Planned(), Exchange.__init__

    def recorded(exchange: Exchange, *args: Any, **options: Any) -> None:
        make(exchange, *args, **options)
        total.add(exchange)

    with mock.patch.object(Exchange, "__init__", recorded):
        yield total


def multiplication_weights() -> TriangleMultiplicationWeights:
    """Weights without values."""
    c = CHANNELS
    shapes = ((c,), (c,), (2 * c, c), (2 * c, c), (c,), (c,), (c, c), (c, c))
    return TriangleMultiplicationWeights(*(torch.empty(s, device="meta") for s in shapes))


def attention_weights() -> TriangleAttentionWeights:
    """Weights without values."""
    c = CHANNELS
    shapes = ((c,), (c,), (HEADS, c), (c, c), (c, c), (c, c), (c, c), (c, c))
    return TriangleAttentionWeights(*(torch.empty(s, device="meta") for s in shapes), HEADS)


def _no_attention(lines: Lines, *_: Any) -> Carry:
    """A carry without computing it: nothing of it travels."""
    o = lines.q.transpose(2, 3)
    return Carry(o, o[..., 0], o[..., 0], None)


def strategies(op: str) -> tuple[str, ...]:
    """The strategies of one of `OPS`."""
    return STRATEGIES[op.rpartition("_")[0]][1:]


@torch.no_grad()
def one_rank(
    op: str, n: int, rows: int, cols: int, rank: int, strategy: str, wire: str = "raw"
) -> dict[str, Any]:
    """Run one operation on one rank.

    Args:
        op: one of `OPS`.
        n: tokens.
        rows: rows of the mesh.
        cols: columns of the mesh.
        rank: this rank.
        strategy: of the op.
        wire: of the mesh.

    Returns:
        Bytes counted by the executor, bytes and number of its plans, and tiles received.
    """
    field = "multiplication" if op.startswith("triangle_multiplication") else "attention"
    mesh = fake_mesh(rows, cols, rank, "meta", **{field: strategy}, wire=wire)
    layout = mesh.layout(n)
    z = torch.empty(1, layout.tile_rows, layout.tile_cols, CHANNELS, device="meta")
    mask = z.new_ones(z.shape[:3])
    of_panels, of_rows = (
        mock.patch(f"foldcp.rings.{ring}.attend_lines", _no_attention)
        for ring in ("triangle_attention", "row_attention")
    )
    with planned() as plan, of_panels, of_rows:
        if field == "multiplication":
            triangle_multiplication(
                z, mask, multiplication_weights(), op.endswith("outgoing"), layout, mesh
            )
        else:
            triangle_attention(z, None, attention_weights(), op.endswith("starting"), layout, mesh)
    tile = z.numel() * z.element_size()
    received = sum(mesh.traffic.received.values())
    return {
        "op": op, "mesh": f"{rows}x{cols}", "strategy": strategy, "wire": wire,
        "tokens": n, "rank": rank,
        "sent": sum(mesh.traffic.sent.values()), "received": received,
        "planned_sent": plan.sent, "planned_received": plan.received,
        "exchanges": plan.exchanges,
        "received_tiles": round(received / tile, 4),
        "bound_tiles": round(bound_tiles(op, layout), 4),
    }  # fmt: skip


def table(n: int) -> list[dict[str, Any]]:
    """One row per operation, mesh, strategy and rank."""
    return [
        one_rank(op, n, r, c, rank, strategy)
        for op in OPS
        for r, c in MESHES
        for strategy in strategies(op)
        for rank in range(r * c)
    ]


def main(argv: list[str] | None = None) -> int:
    """Write the table and print a summary; 1 when executor and plan differ."""
    parser = argparse.ArgumentParser(prog="python -m bench.bytes_moved")
    parser.add_argument("--tokens", type=int, default=576, help="a multiple of 16 x ranks")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(argv)
    rows = table(options.tokens)
    write_csv(options.out, rows)
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["mesh"], row["strategy"]), []).append(row)
    for (op, mesh, strategy), ranks in groups.items():
        got = [r["received_tiles"] for r in ranks]
        bound = statistics.mean(r["bound_tiles"] for r in ranks)
        print(
            f"{op:33} {mesh} {strategy:12} tiles received: mean {statistics.mean(got):.2f}, most "
            f"{max(got):.2f}; lower bound, mean {bound:.2f}"
        )
    different = [
        r for r in rows
        if (r["sent"], r["received"]) != (r["planned_sent"], r["planned_received"])
    ]  # fmt: skip
    print(f"rows where the executor's bytes differ from the plan's: {len(different)}")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
