"""Programs for native/simulator: what exchanges tell the streams of every rank of a mesh.

The real `stream`, `Exchange`, `ahead` and `behind` run once per rank with a link that only writes
down what it is asked for, under a dispatch mode that writes down the copies and sums between;
nothing travels here. Every element of every source is its number in the global tensor, so that each
rank knows what it must find. The format is that of its program.h.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from foldcp.fabric.exchange.autograd import Exchange, stream
from foldcp.fabric.exchange.pipeline import Move, ahead, behind
from foldcp.fabric.mesh import Traffic
from foldcp.fabric.transport.base import Exchanges
from foldcp.fabric.transport.pool import Pool
from foldcp.fabric.transport.program import Program
from foldcp.fabric.transport.wire import Message, staging_bytes
from foldcp.layout.plans import root_plan
from foldcp.layout.schedule import Plan
from foldcp.layout.strategies import ThereAndBack, channel_plans, row_attention
from foldcp.layout.tiles import Box, PairLayout
from foldcp.layout.triangle_plans import (
    triangle_attention_plan,
    triangle_multiplication_plan,
)

CHANNELS = 2
_SOURCE = 1 << 20  # numbers of each further source begin here
_SILENT = {"view", "slice", "select", "alias", "detach", "empty", "new_empty", "empty_like"}
_SILENT |= {"_unsafe_view", "as_strided", "transpose", "t", "permute", "unsqueeze", "expand"}

Build = Callable[[PairLayout], Plan]


class Recorder(TorchDispatchMode):
    """One rank: the mesh, link and flights that `Exchange` uses, and the program it makes."""

    staged = True

    def __init__(self, layout: PairLayout) -> None:
        super().__init__()
        self.exchanges = Exchanges()
        self.steps: list[str] = []
        # By address: memory that torch gave to one tensor after another is one block.
        self._blocks: dict[int, int] = {}
        self._extents: list[int] = []
        self._flights = 0
        device = torch.device("cpu")
        self.mesh: Any = SimpleNamespace(
            link=self, device=device, rank=layout.rank, size=layout.size, cols=layout.mesh_cols,
            traffic=Traffic(), pool=Pool(device), refuse=_refuse, timeline=None,
        )  # fmt: skip

    def flight(self) -> _Flight:
        """Begin an exchange."""
        self._flights += 1
        self.steps.append(f"open {self._flights - 1}")
        return _Flight(self, self._flights - 1)

    def write(self, x: Tensor, numbers: np.ndarray) -> None:
        """The compute stream makes `x`."""
        self.steps.append(f"write {self.place(x)} {_listed(numbers)}")

    def check(self, x: Tensor, numbers: np.ndarray) -> None:
        """The compute stream reads `x` and must find these numbers."""
        if x.numel():
            self.steps.append(f"check {self.place(x)} {_listed(numbers)}")

    def program(self) -> str:
        """Everything, in the format of the simulator."""
        blocks = " ".join(map(str, self._extents))
        return "\n".join([f"rank {len(self._extents)} {blocks}", *self.steps, ""])

    def place(self, x: Tensor) -> str:
        """A view as the simulator reads it."""
        number = self.block(x)
        offset = x.storage_offset() * x.element_size() // 4
        reach = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
        self._extents[number] = max(self._extents[number], offset + reach)
        numbers = (number, offset, x.ndim, *x.shape, *x.stride())
        return " ".join(map(str, numbers))

    def block(self, x: Tensor) -> int:
        """The number of the memory that a tensor lies in."""
        address = x.untyped_storage().data_ptr()
        if address not in self._blocks:
            self._blocks[address] = len(self._extents)
            self._extents.append(0)
        return self._blocks[address]

    def reserve(self, x: Tensor, count: int) -> int:
        """The block of a tensor whose first `count` bytes are used."""
        number = self.block(x)
        self._extents[number] = max(self._extents[number], -(-count // 4))
        return number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("copy_", "add_"):
            self.steps.append(f"{name[:-1]} {self.place(args[0])} {self.place(args[1])}")
        elif name == "clone":
            self.steps.append(f"copy {self.place(out)} {self.place(args[0])}")
        elif name in ("zeros_like", "new_zeros"):
            self.steps.append(f"zero {self.place(out)}")
        elif name not in _SILENT:
            raise RuntimeError(f"the simulator does not know what {func} does")
        return out


class _Flight:
    def __init__(self, recorder: Recorder, number: int) -> None:
        self._r, self._number = recorder, number

    def post(
        self,
        slot: int,
        sends: Sequence[Message],
        recvs: Sequence[Message],
        tag: int,
        staging: Tensor | None,
    ) -> None:
        r = self._r
        parcels = [
            f"{send} {m.peer} {m.runs} {len(m.views)} {' '.join(map(r.place, m.views))}"
            for send, messages in ((1, sends), (0, recvs))
            for m in messages
        ]
        need = staging_bytes([*sends, *recvs])
        block = r.reserve(staging, need) if need else -1
        forwards = int(any(m.held for m in sends))
        head = f"post {self._number} {slot} {forwards} {block} {len(parcels)}"
        r.steps.append(" ".join([head, *parcels]))

    def replay(
        self, slot: int, program: Program, step: int, bases: Any, tag: int, staging: Any
    ) -> None:
        self.post(slot, *program.acts[step].messages(bases), tag, staging)

    def arrive(self, slot: int) -> None:
        self._r.steps.append(f"arrive {self._number} {slot}")

    def land(self) -> None:
        self._r.steps.append(f"land {self._number}")


def _refuse(problem: str) -> None:
    raise ValueError(problem)


def _listed(numbers: np.ndarray) -> str:
    flat = (numbers.reshape(-1) % 2**32).tolist()
    return " ".join(map(str, (len(flat), *flat)))


def _shape(box: Box) -> list[int]:
    return [hi - lo for lo, hi in box]


def _cells(made: Sequence[Plan], source: int) -> np.ndarray:
    """Every element's number in the global tensor that the boxes of all ranks make up."""
    ends = [max(p.owned[source][d][1] for p in made) for d in range(len(made[0].owned[source]))]
    return (np.arange(np.prod(ends)) + source * _SOURCE).reshape(ends)


def _cut(cells: np.ndarray, box: Box) -> np.ndarray:
    return cells[tuple(slice(lo, hi) for lo, hi in box)]


class _Rank:
    """One plan of a rank; its sources hold their cells, counted from `first`."""

    def __init__(
        self, layout: PairLayout, build: Build, recorder: Recorder | None = None, first: int = 1
    ) -> None:
        size = layout.size
        ranks = [PairLayout(layout.n, layout.mesh_rows, layout.mesh_cols, r) for r in range(size)]
        self.made = [build(x) for x in ranks]
        self.plan = self.made[layout.rank]
        self.recorder = recorder or Recorder(layout)
        owned = self.plan.owned
        self.cells = [_cells(self.made, i) + first for i in range(len(owned))]
        self.dims = [tuple(range(len(box))) for box in owned]

    def produce(self) -> tuple[Tensor, ...]:
        """The sources."""
        out = tuple(torch.empty(_shape(box), dtype=torch.int32) for box in self.plan.owned)
        for x, cells, box in zip(out, self.cells, self.plan.owned, strict=True):
            self.recorder.write(x, _cut(cells, box))
        return out

    def stream(self, sources: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        return stream(self.recorder.mesh, self.plan, sources, self.dims, "simulated")

    def check(self, step: int, regions: Sequence[Tensor]) -> None:
        for want, region in zip(self.plan.steps[step].wants, regions, strict=True):
            self.recorder.check(region, _cut(self.cells[want.source], want.box))


def streamed(layout: PairLayout, build: Build, given_up: bool = False) -> str:
    """The program of `stream`; if given up, its user first leaves one after a step."""
    rank = _Rank(layout, build)
    sources = rank.produce()
    with rank.recorder:
        if given_up:
            regions = rank.stream(sources)
            rank.check(0, next(regions))
            regions.close()
        for step, held in enumerate(rank.stream(sources)):
            rank.check(step, held)
    return rank.recorder.program()


def adjoint(layout: PairLayout, build: Build) -> str:
    """The program of gradients that go back to their owners and are added up."""
    rank = _Rank(layout, build)
    total = [np.zeros_like(x) for x in rank.cells]
    mine: list[list[Tensor]] = []
    for r, p in enumerate(rank.made):
        for step, s in enumerate(p.adjoint):
            grads = []
            for slot, want in enumerate(s.wants):
                number = _cut(rank.cells[want.source], want.box) * (50 * r + 2 * step + slot + 1)
                _cut(total[want.source], want.box)[...] += number
                if r == layout.rank:
                    grads.append(torch.empty(_shape(want.box), dtype=torch.int32))
                    rank.recorder.write(grads[-1], number)
            if r == layout.rank:
                mine.append(grads)
    like = [torch.empty(_shape(box), dtype=torch.int32) for box in rank.plan.owned]
    exchange = Exchange(rank.recorder.mesh, rank.plan, like, rank.dims, "simulated")
    with rank.recorder:
        out = exchange.adjoint(mine)
    for x, box, sums in zip(out, rank.plan.owned, total, strict=True):
        rank.recorder.check(x, _cut(sums, box))
    return rank.recorder.program()


def there_and_back(
    layout: PairLayout, ways: Sequence[tuple[Build, Build]], by: Build | None
) -> str:
    """The program of a pipeline: what the second exchange of a pair sends is made of what the first
    brings and, where there is one, of the steps of an exchange that runs in between.
    """
    recorder = Recorder(layout)
    mesh, backs = recorder.mesh, []
    beside = None if by is None else _Rank(layout, by, recorder)
    others = () if beside is None else beside.produce()
    theres = [
        _Rank(layout, there, recorder, (2 * i + 4) * _SOURCE) for i, (there, _) in enumerate(ways)
    ]
    wires, size = ("raw",) * len(theres[0].dims), layout.size
    dims = [tuple(range(len(box))) for box in ways[0][1](layout).owned]

    def firsts() -> Iterator[Move]:
        for rank in theres:
            yield rank.plan, rank.produce()

    def seconds() -> Iterator[Move]:
        regions = ahead(mesh, firsts(), theres[0].dims, "there", wires)
        for i, (_, back) in enumerate(ways):
            theres[i].check(0, next(regions))
            for step, held in enumerate(beside.stream(others) if beside is not None else ()):
                beside.check(step, held)
            backs.append(_Rank(layout, back, recorder, (size * i + 64) * _SOURCE))
            yield backs[-1].plan, backs[-1].produce()

    with recorder:
        results = behind(mesh, seconds(), dims, "back", ("raw",) * len(dims))
        for i, held in enumerate(results):
            backs[i].check(0, held)
    return recorder.program()


def channels(layout: PairLayout) -> str:
    """The strategy `channel`: all planes of some channels there, their products back."""
    span = 0, layout.size * CHANNELS

    def there(x: PairLayout) -> Plan:
        return channel_plans(x, span, True).there

    def back(x: PairLayout) -> Plan:
        return channel_plans(x, span, True).back

    return there_and_back(layout, [(there, back)] * 3, None)


def rows(layout: PairLayout) -> str:
    """The strategy `rows`: whole lines there, panels of the bias, updates back."""

    def chunk(x: PairLayout, i: int) -> ThereAndBack:
        return row_attention(x, True, 2)[1][i]

    count = len(row_attention(layout, True, 2)[1])
    ways = [
        (lambda x, i=i: chunk(x, i).there, lambda x, i=i: chunk(x, i).back) for i in range(count)
    ]
    return there_and_back(layout, ways, lambda x: row_attention(x, True, 2)[0])


def _lines(layout: PairLayout, starting: bool) -> tuple[int, int]:
    return 0, layout.tile_rows if starting else layout.tile_cols


def _pieces(layout: PairLayout) -> int:
    return 2 if layout.panels <= 3 else 1  # enough steps, not too many


BUILDERS: dict[str, Build] = {
    "multiplication-direct": lambda x: triangle_multiplication_plan(
        x, CHANNELS, True, _pieces(x), "direct"
    ),
    "multiplication-ring": lambda x: triangle_multiplication_plan(
        x, CHANNELS, False, _pieces(x), "ring"
    ),
    "attention-direct": lambda x: triangle_attention_plan(x, True, _lines(x, True), "direct"),
    "attention-ring": lambda x: triangle_attention_plan(x, False, _lines(x, False), "ring"),
    "root": lambda x: root_plan(x, 2),
}
PROGRAMS: dict[str, Callable[[PairLayout], str]] = {
    **{name: lambda x, b=build: streamed(x, b) for name, build in BUILDERS.items()},
    "given-up": lambda x: streamed(x, BUILDERS["multiplication-direct"], given_up=True),
    "adjoint": lambda x: adjoint(x, BUILDERS["multiplication-direct"]),
    "channel": channels,
    "rows": rows,
}


@torch.no_grad()
@mock.patch(
    "foldcp.fabric.transport.assembler.LEAST_RUN", 8
)  # bytes: here, too, some pieces are cut in transfers
def write_programs(folder: Path, rows: int, cols: int) -> dict[str, Path]:
    """Write the programs of a mesh; their files by name.

    Args:
        folder: where to.
        rows: rows of the mesh.
        cols: columns of the mesh.
    """
    out = {}
    n = 2 * rows * cols - 1  # padded
    for name, make in PROGRAMS.items():
        ranks = [make(PairLayout(n, rows, cols, r)) for r in range(rows * cols)]
        out[name] = folder / f"{name}-{rows}x{cols}.txt"
        out[name].write_text(f"mesh {rows} {cols}\n{''.join(ranks)}")
    return out
