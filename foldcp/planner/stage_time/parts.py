"""Add up what parts of a stage take: kernels, exchanges, and the host that launches them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from foldcp.layout.plans import partials_plan, row_plan, token_plan, transpose_plan
from foldcp.layout.strategies import Sizes
from foldcp.layout.tiles import PairLayout
from foldcp.layout.volumes import Loads, volumes
from foldcp.planner.choice import chunk_count, estimate
from foldcp.planner.dims import Dims
from foldcp.planner.job import Job
from foldcp.planner.rates import CPU, H100, HOPPER, ONE_MACHINE, Chip, Links
from foldcp.planner.stage_time.kernel_rates import KernelRates
from foldcp.planner.workload import Setup, Workload

# Seconds between two kernels on a GPU, recorded or not: assumed.
KERNEL_GAP = 2e-6
FLOAT32 = 4


@dataclass(frozen=True)
class StageSeconds:
    """Modelled seconds of a stage on the slowest rank.

    Args:
        total_s: start to end.
        compute_s: kernels.
        exposed_s: transfers that nothing hides.
        host_s: what the host takes to launch all of it; on a GPU beside the rest.
        transfer_s: transfers, hidden or not.
        received_bytes: on the wire, mean over the ranks.
    """

    total_s: float = 0.0
    compute_s: float = 0.0
    exposed_s: float = 0.0
    host_s: float = 0.0
    transfer_s: float = 0.0
    received_bytes: float = 0.0

    @property
    def hidden(self) -> float:
        """Fraction of the transfers that kernels hide; 1 without any."""
        return 1 - self.exposed_s / self.transfer_s if self.transfer_s else 1.0


@dataclass(frozen=True)
class Part:
    """Work of a part of a stage. Parts add up, and a number times a part is so many of them.

    Args:
        compute_s: kernels.
        exposed_s: transfers that nothing hides.
        transfer_s: all transfers.
        host_s: the host, without what `launches` and `calls` take.
        received_bytes: on the wire, mean over the ranks.
        launches: of own kernels.
        calls: of torch's operators.
    """

    compute_s: float = 0.0
    exposed_s: float = 0.0
    transfer_s: float = 0.0
    host_s: float = 0.0
    received_bytes: float = 0.0
    launches: float = 0.0
    calls: float = 0.0

    def __add__(self, other: Part) -> Part:
        return Part(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))

    def __rmul__(self, times: float) -> Part:
        return Part(*(times * a for a in _values(self)))


def _values(part: Part) -> tuple[float, ...]:
    return tuple(vars(part).values())


@lru_cache(maxsize=256)
def unit_volumes(kind: str, spans: tuple[str, ...], mesh: tuple[int, int], node: int) -> Loads:
    """Return what every rank moves in a gather, with one token per shard.

    Args:
        kind: "tokens", "partials", "row" or "transpose".
        spans: of `token_plan`, or one for each source.
        mesh: R and Q.
        node: ranks of a node.
    """
    unit = PairLayout(mesh[0] * mesh[1], *mesh, 0)
    if kind == "tokens":
        found = token_plan(unit, spans)
    elif kind == "partials":
        found = partials_plan(unit, len(spans))
    else:
        found = row_plan(unit) if kind == "row" else transpose_plan(unit, 1)
    (loads,) = volumes(found.schedule, tuple(range(len(spans))), node)
    return loads


@dataclass(frozen=True)
class Case:
    """One prediction on one mesh, and what is known of its processors.

    Args:
        workload: the input.
        setup: the mesh and its choices.
        dims: sizes of the model.
        stated: processor of each rank.
        stated_links: between the ranks.
        rates: what kernels reach.
    """

    workload: Workload
    setup: Setup
    dims: Dims
    stated: Chip
    stated_links: Links
    rates: KernelRates

    @property
    def layout(self) -> PairLayout:
        """The tiling, padded as on such a device."""
        multiple = 16 if self.stated.asynchronous else 1
        return PairLayout(self.workload.tokens, self.setup.rows, self.setup.cols, 0, multiple)

    @property
    def tile(self) -> int:
        """Pairs of a tile."""
        return self.layout.tile_rows * self.layout.tile_cols

    @property
    def links(self) -> Links:
        """Links as messages find them."""
        return self.rates.links(self.stated_links)

    def sizes(self, channels: int) -> Sizes:
        """Return the sizes of a triangle op.

        Args:
            channels: of it.
        """
        s, lean = self.setup, self.setup.memory == "lean"
        return Sizes(s.z_itemsize, s.itemsize, channels, self.dims.pair_heads, s.wire, lean)

    def kernel(
        self,
        kernel: str,
        flops: float = 0,
        moved: float = 0,
        exps: float = 0,
        itemsize: int = 0,
        launches: int = 0,
        calls: int = 0,
    ) -> Part:
        """Model a kernel.

        Args:
            kernel: its family, one of `KERNELS`.
            flops: of products.
            moved: bytes.
            exps: exponentials.
            itemsize: of its operands, 0 for what the pair track computes in.
            launches: of own kernels that it is.
            calls: of torch's operators that it is.
        """
        chip, itemsize = self.rates.chip(self.stated, kernel), itemsize or self.setup.itemsize
        if kernel == "linear" and itemsize == FLOAT32:  # of cuBLAS, without tensor cores
            chip = replace(chip, tflops=0.0)
        seconds = chip.seconds(itemsize, flops, moved, exps)
        return Part(compute_s=seconds, launches=launches, calls=calls)

    def exchange(
        self, kind: str, spans: tuple[str, ...], each: Sequence[float], pieces: int = 1
    ) -> Part:
        """Model a gather that nothing hides.

        Args:
            kind: as of `unit_volumes`.
            spans: as of `unit_volumes`.
            each: bytes of a token of each source, of "transpose" of a pair.
            pieces: transfers that a message is, where it is not one run of memory.
        """
        lay, setup = self.layout, self.setup
        if setup.size == 1 or (kind in ("partials", "row") and setup.cols == 1):
            return Part()
        loads = unit_volumes(kind, spans, (setup.rows, setup.cols), self.links.node)
        unit = lay.shard**2 if kind == "transpose" else lay.shard
        wire = [unit * x for x in each]
        raw = replace(self.sizes(self.dims.token_z), wire="raw")
        job = Job(lay, raw, self.stated, self.links, True, 1)
        seconds = max(job.transfers(loads, wire, wire))
        got = sum(load.received(wire) for load in loads) / len(loads)
        messages = max(2 * sum(load.messages) for load in loads)
        return self._moved(seconds, got, messages * pieces)

    def _moved(self, seconds: float, got: float, messages: int) -> Part:
        chip = self.rates.chip(self.stated, "link")
        host = chip.host_seconds(1, int(messages > 0), messages, 0)
        return Part(0.0, seconds, seconds, host, got, calls=6)

    def bytes_moved(self, got: float, peers: int) -> Part:
        """Model an exchange with a few peers that nothing hides.

        Args:
            got: bytes that a rank receives.
            peers: that it receives them from.
        """
        if self.setup.size == 1:
            return Part()
        links = self.links
        link = links.far if self.setup.size > links.node else links.near
        return self._moved(peers * link.latency + got / link.rate(), got, 2 * peers)

    def triangle(self, op: str, name: str, channels: int) -> Part:
        """Model both directions of a triangle op.

        Args:
            op: "triangle_multiplication" or "triangle_attention".
            name: a strategy of it.
            channels: of it.
        """
        lay, sizes, setup = self.layout, self.sizes(channels), self.setup
        chip, shape = self.rates.chip(self.stated, op), (setup.rows, setup.cols)
        chosen_by = (H100, HOPPER) if self.stated.asynchronous else (CPU, ONE_MACHINE)
        largest = setup.chunk_bytes
        count = chunk_count(op, name, lay.padded, shape, sizes, *chosen_by, largest)
        total = Part()
        for first in (True, False):
            given = op, name, lay, sizes
            device = estimate(*given, replace(chip, host=0.0), self.links, first, count, largest)
            host = estimate(*given, chip, self.links, first, count, largest).host_s
            exposed = max(0.0, device.exposed_s) if setup.size > 1 else 0.0
            moving = device.transfer_s if setup.size > 1 else 0.0
            total = total + Part(
                device.compute_s, exposed, moving, host, device.received_bytes, calls=4
            )
        return total

    def seconds(self, part: Part, recorded: bool = False) -> StageSeconds:
        """Sum up a stage.

        Args:
            part: all of it.
            recorded: the host replays it, and launches next to nothing.
        """
        chip = self.rates.chip(self.stated, "host")
        host = part.host_s + chip.host_seconds(0, 0, 0, 1, 0) * part.launches
        host += chip.host_seconds(0, 0, 0, 0, 1) * part.calls
        compute = part.compute_s
        if self.stated.asynchronous:
            compute += KERNEL_GAP * (part.launches + part.calls)
        if recorded:
            host = 0.0
        moving = compute + part.exposed_s
        total = max(moving, host) if self.stated.asynchronous else moving + host
        return StageSeconds(
            total, compute, part.exposed_s, host, part.transfer_s, part.received_bytes
        )
