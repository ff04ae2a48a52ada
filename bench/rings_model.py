"""Model the cost of the triangle ops on 4 to 256 GPUs. **Modelled, not measured.**

    foldcp bench rings --model             # tables, and foldcp_bench/{rings,traffic}/*.csv
    foldcp bench rings --model --table     # a table of what auto takes, nothing is written

z is float32, ops compute in bf16, 128 channels, 4 heads. n is tokens per axis of a tile, N is n
times the side of the mesh; ranks sit 8 to a node. Costs are the mean over both directions of an op:
where the ranks of a mesh row share a node, those of a column do not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from bench.bytes_moved import CHANNELS, bound_tiles
from bench.machine import own_folder, write_csv
from foldcp.fabric.policy import STRATEGIES
from foldcp.layout.tiles import PairLayout
from foldcp.layout.volumes import cannon_tiles
from foldcp.planner.choice import cheapest, estimate, received
from foldcp.planner.cost import ATTENTION, MULTIPLICATION, Estimate, Sizes
from foldcp.planner.rates import (
    B200,
    BLACKWELL,
    H100,
    H200,
    HOPPER,
    NDR,
    NVLINK4,
    NVLINK5,
    PCIE4,
    PCIE5,
    SM80,
    Chip,
    Links,
)

SIDES, LOCAL, WIRES = (2, 4, 8, 16), (512, 1024, 2048, 4096), ("raw", "fp8")
PLATFORMS = ((H100, HOPPER), (H200, HOPPER), (B200, BLACKWELL), (SM80, Links(PCIE4, NDR)))
LINKS = (NVLINK4, NVLINK5, PCIE4, PCIE5, NDR)
TRAFFIC_SIDES, TRAFFIC_LOCAL = (2, 4, 8), 1024
HEADING = "modelled, not measured"
_LARGEST, _STEP = 1 << 16, 32  # tokens per axis of a tile: where crossovers are looked for


@dataclass(frozen=True)
class Case:
    """One op on one mesh of one platform."""

    op: str
    side: int
    local: int
    wire: str
    chip: Chip
    links: Links

    @property
    def layout(self) -> PairLayout:
        """The tiling."""
        return PairLayout(self.local * self.side, self.side, self.side, 0)

    def predicted(self, name: str) -> Estimate:
        """The cost by one strategy, mean over both directions."""
        given = Sizes(wire=self.wire), self.chip, self.links
        both = [estimate(self.op, name, self.layout, *given, first) for first in (True, False)]
        means = [statistics.mean(x) for x in zip(*map(astuple, both), strict=True)]
        return Estimate(*means)

    def auto(self) -> str:
        """The strategy that foldcp takes, whatever the GPU."""
        shape = self.side, self.side
        return cheapest(self.op, self.layout.padded, shape, "direct", Sizes(wire=self.wire))


def cases() -> Iterator[Case]:
    """All cases of the table."""
    for chip, links in PLATFORMS:
        for op in STRATEGIES:
            for side in SIDES:
                for local in LOCAL:
                    for wire in WIRES:
                        yield Case(op, side, local, wire, chip, links)


def model_rows() -> list[dict[str, Any]]:
    """One row per case and strategy."""
    out = []
    for case in cases():
        found = {name: case.predicted(name) for name in STRATEGIES[case.op][1:]}
        best, auto = min(found, key=lambda name: found[name].total_s), case.auto()
        for name, p in found.items():
            out.append(
                {
                    "op": case.op, "gpus": case.side**2, "mesh": f"{case.side}x{case.side}",
                    "tokens": case.layout.n, "local": case.local, "chip": case.chip.name,
                    "links": case.links.name(case.side**2), "strategy": name, "wire": case.wire,
                    "auto": "yes" if name == auto else "",
                    "cheapest_here": "yes" if name == best else "",
                    "compute_ms_modelled": f"{1e3 * p.compute_s:.4g}",
                    "hiding_ms_modelled": f"{1e3 * p.core_s:.4g}",
                    "transfer_ms_modelled": f"{1e3 * p.transfer_s:.4g}",
                    "exposed_ms_modelled": f"{1e3 * p.exposed_s:.4g}",
                    "total_ms_modelled": f"{1e3 * p.total_s:.4g}",
                    "efficiency_modelled": f"{p.efficiency:.3f}",
                    "received_bytes": round(p.received_bytes),
                }
            )  # fmt: skip
    return out


def traffic_rows() -> list[dict[str, Any]]:
    """Tiles that a rank receives, by scheme; a tile is a bf16 plane of a or b with all channels."""
    out = []
    for op in STRATEGIES:
        for side in TRAFFIC_SIDES:
            layouts = [PairLayout(TRAFFIC_LOCAL * side, side, side, r) for r in range(side**2)]
            tile = TRAFFIC_LOCAL**2 * CHANNELS * 2
            schemes: dict[str, tuple[float, float]] = {}
            for name in STRATEGIES[op][1:]:
                tiles = [x / tile for x in received(op, name, layouts[0], Sizes())]
                schemes[name] = statistics.mean(tiles), max(tiles)
            if op == MULTIPLICATION:
                schemes["Cannon, as Fold-CP is described"] = cannon_tiles(side**2)
            first = {MULTIPLICATION: "outgoing", ATTENTION: "starting"}[op]
            bounds = [bound_tiles(f"{op}_{first}", layout) for layout in layouts]
            schemes["lower bound of panels"] = statistics.mean(bounds), max(bounds)
            out += [
                {
                    "op": op, "gpus": side**2, "mesh": f"{side}x{side}", "local": TRAFFIC_LOCAL,
                    "scheme": scheme, "tiles_mean": round(mean, 3), "tiles_most": round(most, 3),
                    "bytes_mean": round(mean * tile),
                }
                for scheme, (mean, most) in schemes.items()
            ]  # fmt: skip
    return out


def crossover(case: Case, name: str) -> int | None:
    """The least n from which a strategy's math takes as long as the transfers that it hides.

    Returns:
        Tokens per axis of a tile, None when there is none below 65,536.
    """

    def bound(steps: int) -> bool:
        p = replace(case, local=steps * _STEP * case.side).predicted(name)
        return p.transfer_s > p.core_s

    low, high = 0, _LARGEST // (_STEP * case.side)
    if bound(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bound(middle) else (low, middle)
    return high * _STEP * case.side


def crossover_rows() -> list[dict[str, Any]]:
    """The table of crossovers on 2x2 ranks with one link between all."""
    return [
        {
            "op": op, "mesh": "2x2", "chip": chip.name, "link": link.name, "strategy": name,
            "wire": wire, "local_modelled": crossover(
                Case(op, 2, 0, wire, chip, Links(link, link)), name
            ) or "",
        }
        for op, names in STRATEGIES.items() for chip, link in _crossing() for name in names[1:]
        for wire in WIRES
    ]  # fmt: skip


def _crossing() -> Iterator[tuple[Chip, Any]]:
    for link in LINKS:
        yield H100, link
    yield B200, NVLINK5
    yield SM80, PCIE4


def markdown() -> str:
    """Tabulate what auto takes on H100 GPUs, as docs/results/rings-model.md shows it."""
    lines = [
        f"H100, 8 a node, NVLink 4 and 400 Gb/s InfiniBand per GPU: **{HEADING}**\n",
        "| GPUs | N | op | strategy | math, ms | in all, ms | overlap | received, GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for side in SIDES:
        for local in (1024, 2048):
            for op in STRATEGIES:
                case = Case(op, side, local, "raw", H100, HOPPER)
                name = case.auto()
                p = case.predicted(name)
                gb = f"{p.received_bytes / 1e9:.2f}"
                lines.append(
                    f"| {side**2} | {case.layout.n:,} | {op.replace('_', ' ')} | `{name}` | "
                    f"{1e3 * p.compute_s:.1f} | {1e3 * p.total_s:.1f} | {p.efficiency:.1%} | {gb} |"
                )
    return "\n".join(lines)


def show_model(rows: list[dict[str, Any]]) -> None:
    """Print the strategies that auto takes, uncompressed."""
    for chip, links in PLATFORMS:
        wide = links.name(links.node + 1)
        print(f"\n{chip.name}, {wide} ({HEADING}): {chip.source}")
        print(
            f"{'op':24} {'mesh':6} {'n':>5} {'N':>6} strategy       math  in all ms  overlap    GB"
        )
        for r in rows:
            if r["chip"] == chip.name and r["auto"] and r["wire"] == "raw":
                print(
                    f"{r['op']:24} {r['mesh']:6} {r['local']:5} {r['tokens']:6} {r['strategy']:12} "
                    f"{float(r['compute_ms_modelled']):7.1f} "
                    f"{float(r['total_ms_modelled']):9.1f} "
                    f"{float(r['efficiency_modelled']):8.0%} {r['received_bytes'] / 1e9:6.2f}"
                )
    lost = [r for r in rows if r["auto"] and not r["cheapest_here"]]
    auto = sum(1 for r in rows if r["auto"])
    print(f"\nauto is not the cheapest on the platform in {len(lost)} of {auto} cases ({HEADING})")


def show_tables(traffic: list[dict[str, Any]], crossing: list[dict[str, Any]]) -> None:
    """Print tiles received and crossovers."""
    print("\ntiles received per rank, mean (most); exact, of formulas that equal the plans")
    for r in traffic:
        print(
            f"{r['op']:24} {r['mesh']:5} {r['scheme']:32} {r['tiles_mean']:7.2f} "
            f"({r['tiles_most']:.2f})"
        )
    print(f"\nn from which transfers fit under the math beside them ({HEADING}), 2x2")
    for r in crossing:
        n = r["local_modelled"] or "never"
        print(f"{r['op']:24} {r['chip']:12} {r['link']:15} {r['strategy']:13} {r['wire']:4} {n:>6}")


def main(argv: list[str] | None = None) -> int:
    """Print and write the tables."""
    parser = argparse.ArgumentParser(prog="foldcp bench rings --model")
    parser.add_argument("--table", action="store_true", help="print the table of H100 only")
    parser.add_argument("--out", type=Path, default=own_folder(), help="folder of results")
    options = parser.parse_args(argv)
    if options.table:
        print(markdown())
        return 0
    rows, traffic, crossing = model_rows(), traffic_rows(), crossover_rows()
    show_model(rows)
    show_tables(traffic, crossing)
    write_csv(options.out / "rings" / "model.csv", rows)
    write_csv(options.out / "rings" / "crossover.csv", crossing)
    write_csv(options.out / "traffic" / "strategies.csv", traffic)
    print(f"\nwritten to {options.out}: rings/model.csv, rings/crossover.csv, ", end="")
    print("traffic/strategies.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
