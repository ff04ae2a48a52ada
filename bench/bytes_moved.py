"""Bytes that each rank moves in the triangle operations, against the plan and the lower bound.

Every rank of a mesh runs the operation on shapes alone, without the others (`bench.fake_mesh`), so
what it posts is what it would send and receive. A tile is one 128-channel plane of a or b over the
pairs of one rank. The lower bound counts every element that a rank needs and does not own, once.

    python -m bench.bytes_moved                  # bench/results/traffic/triangle.csv
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import foldcp.exchange
from bench.fake_mesh import fake_mesh, no_peers
from bench.machine import ROOT, write_csv
from foldcp.exchange import Exchange
from foldcp.layout import PairLayout
from foldcp.rings.triangle_attention import triangle_attention
from foldcp.rings.triangle_multiplication import triangle_multiplication
from foldcp.schedule import Plan, intersect, volume
from foldcp_kernels.carry import Carry
from foldcp_kernels.triangle_attention import Lines, TriangleAttentionWeights
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
    """What the plans of all exchanges of one operation add up to, in bytes."""

    sent: int = 0
    received: int = 0

    def add(self, plan: Plan, exchange: Exchange) -> None:
        """Add one exchange."""
        units = [_bytes_of_one(x, d) for x, d in zip(exchange.sources, exchange.dims, strict=True)]
        for step in plan.steps:
            self.sent += sum(volume(p.box) * units[p.source] for p in step.sends)
            self.received += sum(volume(p.box) * units[p.source] for p in step.recvs)


def bound_tiles(op: str, layout: PairLayout) -> float:
    """Tiles that a rank needs and does not own, each element once.

    Args:
        op: one of `OPS`. layout: the tiling, of this rank.
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


def _bytes_of_one(x: torch.Tensor, dims: tuple[int, ...]) -> int:
    count = x.element_size()
    for d, length in enumerate(x.shape):
        count *= 1 if d in dims else length
    return count


@contextmanager
def planned() -> Iterator[Planned]:
    """Add up the plans of all exchanges that are made inside."""
    total = Planned()

    class Recorded(Exchange):
        def __init__(self, mesh: Any, plan: Plan, *rest: Any) -> None:
            super().__init__(mesh, plan, *rest)
            total.add(plan, self)

    with mock.patch.object(foldcp.exchange, "Exchange", Recorded):
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
    return Carry(o, o[..., 0], None)


_NO_ATTENTION = mock.patch("foldcp.rings.triangle_attention.attend_lines", _no_attention)


@torch.no_grad()
def one_rank(op: str, n: int, rows: int, cols: int, rank: int, route: str) -> dict[str, Any]:
    """Run one operation on one rank.

    Args:
        op: one of `OPS`. n: tokens. rows, cols, rank: place in the mesh. route: of the mesh.

    Returns:
        Bytes counted by the executor, bytes of the plans, and tiles received.
    """
    mesh = fake_mesh(rows, cols, rank, "meta", route)
    layout = PairLayout(n, rows, cols, rank)
    z = torch.empty(1, layout.tile_rows, layout.tile_cols, CHANNELS, device="meta")
    mask = z.new_ones(z.shape[:3])
    with no_peers(), planned() as plan, _NO_ATTENTION:
        if op.startswith("triangle_multiplication"):
            triangle_multiplication(
                z, mask, multiplication_weights(), op.endswith("outgoing"), layout, mesh
            )
        else:
            triangle_attention(z, None, attention_weights(), op.endswith("starting"), layout, mesh)
    tile = z.numel() * z.element_size()
    received = sum(mesh.received.values())
    return {
        "op": op, "mesh": f"{rows}x{cols}", "route": route, "tokens": n, "rank": rank,
        "sent": sum(mesh.sent.values()), "received": received,
        "planned_sent": plan.sent, "planned_received": plan.received,
        "received_tiles": round(received / tile, 4),
        "bound_tiles": round(bound_tiles(op, layout), 4),
    }  # fmt: skip


def table(n: int) -> list[dict[str, Any]]:
    """One row per operation, mesh, route and rank."""
    return [
        one_rank(op, n, r, c, rank, route)
        for op in OPS
        for r, c in MESHES
        for route in ("direct", "ring")
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
        groups.setdefault((row["op"], row["mesh"], row["route"]), []).append(row)
    for (op, mesh, route), ranks in groups.items():
        got = [r["received_tiles"] for r in ranks]
        bound = statistics.mean(r["bound_tiles"] for r in ranks)
        print(
            f"{op:33} {mesh} {route:7} tiles received: mean {statistics.mean(got):.2f}, most "
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
