"""Transports: alike to the bit, fast, quick to notice a rank that is gone or does otherwise."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from ranks import run
from torch import Tensor

from bench.transports import compare
from foldcp.errors import TransportError
from foldcp.fabric.exchange import timeline
from foldcp.fabric.exchange.autograd import Exchange, fetch, scatter_add, stream
from foldcp.fabric.mesh import Mesh
from foldcp.fabric.transport.torch_transport import TorchTransport
from foldcp.fabric.transport.wire import decode, encode
from foldcp.layout.plans import partials_plan, token_plan, transpose_plan
from foldcp.layout.schedule import Plan, Schedule, Want, plan
from foldcp.layout.tiles import AtomLayout, Box, PairLayout
from foldcp.layout.triangle_plans import triangle_attention_plan, triangle_multiplication_plan
from foldcp.planner.agreement import agree
from foldcp.rings.triangle_attention import triangle_attention
from foldcp_kernels.core.chunking import set_chunk_bytes
from foldcp_kernels.triangle_attention import TriangleAttentionWeights

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ODD = 7  # channels of some sources


def _sizes(box: Box) -> tuple[int, ...]:
    return tuple(hi - lo for lo, hi in box)


def _cases(layout: PairLayout) -> list[tuple[str, Plan, list[tuple[int, ...]], list[Any]]]:
    """(name, plan, shape of each source outside its boxes, dims of the boxes)."""
    r, c, n = layout.tile_rows, layout.tile_cols, layout.shard
    cases = []
    for route in ("direct", "ring"):
        for outgoing in (True, False):
            made = triangle_multiplication_plan(layout, 5, outgoing, 2, route)
            planes = [(2, *_sizes(box)) for box in made.owned]
            dims = [(1, 2, 3)] * len(planes)
            cases.append((f"multiplication {route} {outgoing}", made, planes, dims))
        made = triangle_attention_plan(layout, True, (0, r), route)
        half = len(made.owned) // 2
        lines = [(2, *_sizes(box), ODD) for box in made.owned[:half]]
        lines += [(2, 3, *_sizes(box)) for box in made.owned[half:]]
        cases.append((f"attention {route}", made, lines, [(1, 2)] * half + [(2, 3)] * half))
    cases.append(("tokens", token_plan(layout, ("rows", "all")), [(2, n, 3)] * 2, [(1,)] * 2))
    cases.append(("partials", partials_plan(layout, 1), [(1, 2, r)], [(0, 2)]))
    cases.append(("transpose", transpose_plan(layout, 3), [(2, r, c, 3)], [(1, 2)]))
    return cases


def _regions(mesh: Mesh, made: Plan, sources: list[Tensor], dims: Any, wires: Any) -> list[Tensor]:
    steps = stream(mesh, made, sources, dims, "case", wires)
    return [x.clone() for step in steps for x in step]


def alike(mesh: Mesh) -> str:
    """What arrives, forward and backward, raw and as FP8, is the same to the bit."""
    assert mesh.transport == "host"
    gloo = replace(mesh, link=TorchTransport(mesh.ranks))
    for n in (1, 19, 30):
        layout = PairLayout(n, mesh.rows, mesh.cols, mesh.rank)
        g = torch.Generator().manual_seed(mesh.rank)
        for i, (name, made, shapes, dims) in enumerate(_cases(layout)):
            dtype = DTYPES[i % len(DTYPES)]
            # Views with strides of their own; sizes that no segment divides.
            sources = [
                torch.randn(*s[:-1], s[-1] + 1, generator=g).to(dtype)[..., :-1] for s in shapes
            ]
            for wire in ("raw", "fp8"):
                wires = [wire] * len(sources)
                a, b = (_regions(m, made, sources, dims, wires) for m in (mesh, gloo))
                assert len(a) == len(b) > 0
                if wire == "raw":  # cut in transfers, and with the same program replayed elsewhere
                    with mock.patch.multiple(
                        "foldcp.fabric.transport.assembler", LEAST_RUN=1, MOST_RUNS=64
                    ):
                        for x in (sources, [y.clone() for y in sources], sources):
                            again = _regions(mesh, made, x, dims, wires)
                            assert all(map(torch.equal, again, b)), (name, n, "in runs")
                for x, y in zip(a, b, strict=True):
                    assert torch.equal(x, y), (name, n, wire)
                grads = [[x * (k + 1) for x in step] for k, step in enumerate(_by_step(made, a))]
                a, b = (
                    Exchange(m, made, sources, dims, "case", wires).adjoint(grads)
                    for m in (mesh, gloo)
                )
                for x, y in zip(a, b, strict=True):
                    assert torch.equal(x, y), (name, n, wire, "adjoint")
    return mesh.transport


def _by_step(made: Plan, flat: list[Tensor]) -> list[list[Tensor]]:
    out, at = [], 0
    for s in made.steps:
        out.append(flat[at : at + len(s.wants)])
        at += len(s.wants)
    return out


def interleaved(mesh: Mesh) -> str:
    """Two exchanges that are open at once do not touch each other's buffers."""
    layout = PairLayout(24, mesh.rows, mesh.cols, mesh.rank)
    made = triangle_multiplication_plan(layout, 4, True, 2, "direct")
    shapes = [(1, *_sizes(box)) for box in made.owned]
    dims = ((1, 2, 3),) * len(shapes)
    g = torch.Generator().manual_seed(mesh.rank)
    one, two = ([torch.randn(s, generator=g) for s in shapes] for _ in range(2))
    want = [_regions(mesh, made, x, dims, None) for x in (one, two)]
    got: list[list[Tensor]] = [[], []]
    with Exchange(mesh, made, one, dims, "one") as a, Exchange(mesh, made, two, dims, "two") as b:
        a.start(0)
        for step in range(len(made.steps)):
            held = a.wait()
            if step + 1 < len(made.steps):
                a.start(step + 1)
            b.start(step)
            got[0] += [x.clone() for x in held]
            got[1] += [x.clone() for x in b.wait()]
            assert all(torch.equal(x, y) for x, y in zip(held, got[0][-len(held) :], strict=True))
    for x, y in zip(got, want, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(x, y, strict=True))
    (back,) = scatter_add(
        mesh, token_plan(layout, ("all",)), (torch.ones(1, 24),), ((1,),), "scatter"
    )
    assert bool((back == mesh.size).all())
    return "ok"


def counted(mesh: Mesh) -> tuple[int, int]:
    """(bytes raw, bytes as FP8) that all ranks send for keys and values of 256 channels."""
    layout = PairLayout(48, mesh.rows, mesh.cols, mesh.rank)
    made = triangle_attention_plan(layout, True, (0, layout.tile_rows), "direct")
    half = len(made.owned) // 2
    kv = [torch.randn(1, *_sizes(box), 256).bfloat16() for box in made.owned[:half]]
    bias = [torch.randn(1, 4, *_sizes(box)).bfloat16() for box in made.owned[half:]]
    dims = [(1, 2)] * half + [(2, 3)] * half
    out = []
    for wire in ("raw", "fp8"):
        mesh.traffic.sent.clear()
        _regions(mesh, made, [*kv, *bias], dims, [wire] * half + ["raw"] * half)
        out.append(sum(mesh.ranks.all_gather_object(sum(mesh.traffic.sent.values()))))
    return out[0], out[1]


def overlapped(mesh: Mesh) -> float:
    """Fraction of the steps whose next transfer began and ended while their math ran."""
    numel, steps = 1 << 20, 12
    made = plan(
        Schedule(
            mesh.size,
            steps,
            lambda r, _: ((r, r + 1), (0, numel)),
            lambda r, t: (Want(0, (((r + 1) % mesh.size, (r + 1) % mesh.size + 1), (0, numel))),),
        ),
        mesh.rank,
        1,
    )
    source = torch.full((1, numel), float(mesh.rank))
    with timeline.record(mesh) as line:
        for (x,) in stream(mesh, made, (source,), ((0, 1),), "overlap"):
            end = time.perf_counter() + 0.04
            while time.perf_counter() < end:
                assert float(x[0, :4096].sum()) == 4096 * ((mesh.rank + 1) % mesh.size)
    math = {i.step: i for i in line.intervals if i.kind == "math"}
    moved = {i.step: i for i in line.intervals if i.kind == "transfer"}
    assert sorted(moved) == list(range(steps)) == sorted(math)
    inside = [math[t].start < moved[t + 1].end < math[t].end for t in range(steps - 1)]
    return sum(inside) / len(inside)


def refused(mesh: Mesh) -> str:
    """Ranks that plan for different sizes, or one that has a wrong tensor, all say so at once."""
    n = 24 if mesh.rank else 48
    layout = PairLayout(n, mesh.rows, mesh.cols, mesh.rank)
    made, x = token_plan(layout, ("all",)), torch.zeros(1, layout.shard)
    start = time.monotonic()
    try:
        fetch(mesh, made, (x,), ((1,),), "odd")
        said = "nothing"
    except TransportError as error:
        said = str(error)
    assert time.monotonic() - start < 5, said
    try:  # the transport stays closed
        fetch(mesh, made, (x,), ((1,),), "odd")
        raise AssertionError("no error")
    except TransportError as error:
        assert str(error) == said
    return said


def wrong_tensor(mesh: Mesh) -> str:
    """Rank 1 passes a shard of the wrong shape."""
    layout = PairLayout(24, mesh.rows, mesh.cols, mesh.rank)
    shard = torch.zeros(1, layout.shard - (mesh.rank == 1))
    try:
        fetch(mesh, token_plan(layout, ("all",)), (shard,), ((1,),), "shard")
    except (TransportError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def disagreeing(mesh: Mesh) -> dict[str, str]:
    """What `agree` says when rank 1 has another input, chunk size or strategy."""
    said = {}
    for case in ("alike", "tokens", "atoms", "chunks", "strategy", "memory"):
        other = mesh.rank == 1
        layout = PairLayout(25 if other and case == "tokens" else 24, 2, 2, mesh.rank)
        atoms = AtomLayout(9 if other and case == "atoms" else 8, 4, mesh.rank)
        name = "channel" if other and case == "strategy" else "panel-ring"
        set_chunk_bytes(4096 if other and case == "chunks" else None)
        try:
            memory = "lean" if other and case == "memory" else "fast"
            agree(layout, atoms, mesh.with_policy(multiplication=name, memory=memory))
            said[case] = "nothing"
        except TransportError as error:
            said[case] = str(error)
        set_chunk_bytes(None)
    return said


def test_ranks_that_plan_otherwise_are_told() -> None:
    found = run(2, 2, disagreeing)
    assert all(said == found[0] for said in found), found
    said = found[0]
    assert said["alike"] == "nothing"
    for case, what in {
        "tokens": "number of tokens is 25 on rank 1 and 24 on rank 0",
        "atoms": "number of atoms is 288 on rank 1 and 256 on rank 0",
        "chunks": "largest chunk is 4096 bytes on rank 1 and 8000000 bytes on rank 0",
        "strategy": "strategy of triangle_multiplication is channel on rank 1 and panel-ring on",
        "memory": "memory is lean on rank 1 and fast on rank 0",
    }.items():
        assert f"the ranks plan different exchanges: {what}" in said[case]


def wrong_tile(mesh: Mesh) -> list[str]:
    """Rank 1 passes the wrong tile to a triangle op, then (on another transport) a wrong device."""
    said = []
    c = 8
    w = TriangleAttentionWeights(
        *(torch.ones(s) for s in ((c,), (c,), (2, c), (c, c), (c, c), (c, c), (c, c), (c, c))), 2
    )
    layout = PairLayout(24, mesh.rows, mesh.cols, mesh.rank)
    shape = (1, layout.tile_rows, layout.tile_cols, c)
    bad = {"shape": torch.zeros(1, 7, 7, c), "device": torch.zeros(shape, device="meta")}
    for z in bad.values():
        here = mesh.connected("host")
        try:
            triangle_attention(
                z if mesh.rank == 1 else torch.zeros(shape), None, w, True, layout, here
            )
            said.append("nothing")
        except (TransportError, ValueError) as error:
            said.append(str(error).split("rank 1: ")[-1])
    return said


def everything(mesh: Mesh) -> dict[str, Any]:
    """The cases of one mesh that must not break the transport, then one that does."""
    cases: list[Callable[[Mesh], Any]] = [alike, interleaved, counted]
    out = {case.__name__: case(mesh) for case in cases}
    out["refused"] = refused(mesh)
    return out


@pytest.mark.parametrize("rows,cols", [(1, 2), (2, 2), (2, 3)], ids=str)
def test_host_and_gloo_are_alike(rows: int, cols: int) -> None:
    before = set(os.listdir("/dev/shm"))
    found = run(rows, cols, everything)
    assert set(os.listdir("/dev/shm")) == before
    said = {r["refused"] for r in found}
    assert len(said) == 1 and "the ranks run different plans" in said.pop()
    raw, fp8 = found[0]["counted"]
    assert 0.5 < fp8 / raw < 0.53  # one byte and 4 per 128, against two; the bias stays raw


@pytest.mark.timed
def test_most_steps_run_under_math() -> None:
    # The lane's thread may get no core for a while: most steps are enough.
    fractions = run(1, 2, overlapped)
    assert min(fractions) >= 0.7, fractions


def test_one_rank_with_a_wrong_tensor_ends_all() -> None:
    said = run(2, 2, wrong_tensor)
    shape = "source 0 of the exchange 'shard' is [1, 5]; its plan expects [1, 6]"
    assert said[1] == f"ValueError: {shape}"
    for rank in (0, 2, 3):
        assert said[rank] == f"TransportError: exchange of tiles (host): rank 1: {shape}"


def test_a_wrong_tile_on_one_rank_ends_the_op_on_all() -> None:
    found = run(2, 2, wrong_tile, transport="gloo")
    assert found[0] == found[1] == found[2], found
    # Rank 3 takes nothing from rank 1: it may be done before it hears of the error.
    assert all(s in (told, "nothing") for s, told in zip(found[3], found[1], strict=True)), found
    shape, device = found[1]
    assert shape == "`z` tile is [1, 7, 7, 8]; layout (N=24, mesh 2x2) expects [1, 12, 12, 8]"
    assert device == "`z` is on meta, but the mesh is on cpu: move it there"


@pytest.mark.timed
def test_host_is_much_faster_than_gloo() -> None:
    # Other processes take the cores at times, which 16 MB feel: best of three.
    seen: list[dict[int, dict[str, float]]] = []
    for _ in range(3):
        found = run(2, 2, compare)
        seen.append(
            {
                size: {name: max(r[size][name] for r in found) for name in ("host", "gloo")}
                for size in (4 << 10, 16 << 20)
            }
        )
        small, large = seen[-1].values()
        if small["host"] <= 0.1 * small["gloo"] and large["host"] <= large["gloo"]:
            return
    raise AssertionError(f"seconds by bytes and transport: {seen}")


def test_fp8_error_is_bounded() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 128, generator=g) * torch.logspace(-6, 6, 1000)[:, None]
    x[:, ::7] *= 1e-3
    scales, payload = encode(x)
    got = decode(scales, payload).view_as(x)
    bound = torch.maximum(x.abs() / 16, scales[:, None] / 1024)
    assert bool(((got - x).abs() <= bound).all())
    assert bool((scales * 448 >= x.abs().amax(1)).all())
    assert torch.equal(decode(*encode(got)).view_as(x), got)  # a second trip loses nothing


def unusable(mesh: Mesh) -> dict[str, str]:
    """What is said of transports that are for other devices, unknown, or not asked for alike."""
    said = {}
    for name in ("copy-engine", "torch-nccl", "mpi", "gloo" if mesh.rank else "host"):
        try:
            mesh.connected(name)
        except (TransportError, ValueError) as error:
            said["differing" if name in ("gloo", "host") else name] = str(error)
    return said


def test_transports_that_cannot_run_here() -> None:
    first, second = run(1, 2, unusable, transport="gloo")
    for name in ("copy-engine", "torch-nccl"):
        assert first[name] == second[name]
        assert "is for GPUs, but this mesh is on cpu: use auto" in first[name]
    assert "transport must be one of" in first["mpi"]
    assert "rank 0 asks for transport host" in first["differing"]
    assert "rank 1 asks for transport gloo" in second["differing"]
