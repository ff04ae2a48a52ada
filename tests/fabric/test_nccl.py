"""The NCCL carrier with a stand-in for the library (native/mock_nccl.cpp), four ranks on CPUs."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from native import SOURCES, Place, compile_shared, decode, encode, operators, wire_bytes
from nccl_aborts import case_abort_hangs, case_aborts
from nccl_engine import LIBRARY, SIZE, SLACK, SOON, Engine, Waiting, raises, until
from ranks import run
from torch import Tensor

from foldcp.config import order_nccl
from foldcp.fabric.mesh import Mesh


def _pieces(source: int, target: int, step: int) -> list[tuple[Tensor, bool]]:
    """What a rank sends another: strided views, FP8, small types, nothing at all."""
    random = torch.Generator().manual_seed(100 * source + 10 * target + step)
    if step == 1:  # one contiguous piece is not packed
        return [(torch.randint(0, 1000, (7, 5), generator=random), False)]
    wide = torch.randn(5, 12, 8, generator=random)
    return [
        (wide[:, ::3, 1:7], False),
        (torch.randn(9, 31, generator=random).bfloat16().t(), True),
        (wide[:0], False),
        (wide.half()[1:3].transpose(0, 2)[..., None, :], step == 2),
        ((wide > 0)[0, :, 1], False),
        (torch.tensor(step + 0.5, dtype=torch.float64), False),
    ]


def _exchange_data(engine: Engine) -> None:
    """Several steps in two slots; every piece lands in a strided view, and nowhere else."""
    others = [p for p in range(SIZE) if p != engine.rank]
    flight = engine.ops.flight_open(engine.handle)
    seen, around = {}, {}

    def post(step: int) -> None:
        recvs = {}
        for peer in others:
            pieces = _pieces(peer, engine.rank, step)
            bases = [v.new_full((*v.shape, 2), 77) for v, _ in pieces]
            if step == 1:
                bases = [v.new_full((1, *v.shape), 77) for v, _ in pieces]
            views = [b[0] if step == 1 else b[..., 1] for b in bases]
            around[step, peer] = [] if step == 1 else [b[..., 0] for b in bases]
            recvs[peer] = [(v, fp8) for v, (_, fp8) in zip(views, pieces, strict=True)]
            seen[step, peer] = views
        sends = {peer: _pieces(engine.rank, peer, step) for peer in others}
        engine.post(flight, step % 2, sends, recvs)

    steps = 4
    post(0)
    for step in range(steps):
        while not engine.ops.flight_reached(engine.handle, flight, step % 2, 0.01):
            pass
        engine.ops.flight_arrive(engine.handle, flight, step % 2)
        if step + 1 < steps:
            post(step + 1)
        for peer in others:
            pieces = _pieces(peer, engine.rank, step)
            for got, (sent, fp8) in zip(seen[step, peer], pieces, strict=True):
                want = decode(encode(sent), sent) if fp8 else sent
                assert torch.equal(got, want), (step, peer, got, want)
            assert all((a == 77).all() for a in around[step, peer] if a.dtype != torch.bool)
    engine.ops.flight_land(engine.handle, flight)


def _lines(place: Place, engine: Engine) -> list[list[list[str]]]:
    texts = place.gather(engine.log.read_text())
    return [[line.split() for line in text.splitlines()] for text in texts]


def _check_order(all_calls: list[list[list[str]]]) -> None:
    """What each rank sends another on a communicator is what that one receives, in this order."""
    moved: dict[tuple[str, str, str, str], list[str]] = {}
    for calls in all_calls:
        place = {c[1]: (c[2], c[3]) for c in calls if c[0] == "Init"}
        for call in (c for c in calls if c[0] == "Exchange"):
            comm, rank = place[call[1]]
            for kind, peer, size in (op.split(":") for op in call[2:]):
                pair = (rank, peer) if kind == "send" else (peer, rank)
                moved.setdefault((comm, *pair, kind), []).append(size)
    sends = {key[:3]: sizes for key, sizes in moved.items() if key[3] == "send"}
    assert len(sends) == SIZE * (SIZE - 1)
    assert sends == {key[:3]: sizes for key, sizes in moved.items() if key[3] == "recv"}
    wanted = [sum(_aligned(wire_bytes(*p)) for p in _pieces(0, 1, step)) for step in range(4)]
    assert all(len(sizes) == 4 for sizes in sends.values())
    assert all(
        w - 16 < int(size) <= w
        for sizes in sends.values()
        for size, w in zip(sizes, wanted, strict=True)
    )


def _aligned(n: int) -> int:
    return -(-n // 16) * 16


def case_data(place: Place) -> None:
    for polls in (0, 7, 80):
        engine = Engine(place, f"data{polls}", polls=polls)
        _exchange_data(engine)
        _check_order(_lines(place, engine))
        engine.close()
        engine.check_calls("Destroy")


def case_many(place: Place) -> None:
    """One exchange after the other, without a meeting between."""
    engine = Engine(place, "many")
    for _ in range(100):
        engine.swap({})
    engine.close()
    engine.check_calls("Destroy")


def case_pairs(place: Place) -> None:
    """Two meshes of 1x2; only their first ranks make an identifier."""
    ops, library = operators(), str(place.folder / LIBRARY)
    os.environ["MOCK_NCCL_DIR"] = str(place.folder)
    order_nccl(os.environ)
    mine = "" if place.rank % 2 else ops.nccl_unique_id(library)
    ids = place.gather(mine)
    os.environ["MOCK_NCCL_LOG"] = str(place.folder / f"pair.log{place.rank}")
    handle = ops.nccl_open(library, -1, place.rank % 2, 2, ids[place.rank // 2 * 2], 0, 20.0)
    out, into = torch.full((3,), float(place.rank)), torch.zeros(3)
    peer = [1 - place.rank % 2]
    flight = ops.flight_open(handle)
    staging = torch.zeros(0, dtype=torch.uint8)
    ops.flight_post(handle, flight, 0, [out], peer, [0], [into], peer, [0], staging, 1)
    ops.flight_arrive(handle, flight, 0)
    assert (into == (place.rank ^ 1)).all()
    ops.engine_close(handle)
    calls = Path(os.environ["MOCK_NCCL_LOG"]).read_text().splitlines()
    assert [c.split()[0] for c in calls] == ["Init", "Exchange", "Finalize", "Destroy"]


def case_error(place: Place) -> None:
    """NCCL finds an error on one rank; the others are told, as the engine's transport does."""
    bad = place.rank == 1
    engine = Engine(place, "error", polls=3, **({"error_at": 1} if bad else {}))
    engine.swap({})
    what = "failed: remote process exited.*(the stand-in was told to fail)"
    if bad:
        first = raises(lambda: engine.swap({}), what, SOON)
        (place.folder / "error.message").write_text(first)
    else:
        # Wait in a thread, be told in this one.
        thread = Waiting(lambda: engine.swap({}))
        until(lambda: (place.folder / "error.message").exists())
        told = time.monotonic()
        engine.ops.engine_abort(engine.handle, "rank 1 has failed")
        first = thread.error()
        assert time.monotonic() - told < SOON
        assert first == "rank 1 has failed"
    assert engine.ops.engine_error(engine.handle) == first
    for _ in range(2):  # of no more use: the same error at once
        assert raises(lambda: engine.swap({}), "", SOON) == first
    engine.ops.engine_abort(engine.handle, "too late")
    assert engine.ops.engine_error(engine.handle) == first
    engine.close()
    engine.check_calls("Abort")
    exchanges = [c for c in engine.calls() if c[0] == "Exchange"]
    assert len(exchanges) <= 6, "exchanges after the error"


def case_hang(place: Place) -> None:
    """One rank's exchange is never done: all find out by the deadline."""
    engine = Engine(place, "hang", deadline=1.5, **({"hang_at": 1} if place.rank == 2 else {}))
    engine.swap({})
    late = "an exchange took longer than 1 s: a rank is missing or does something else"
    place.meet()
    raises(lambda: engine.swap({}), late, 1.5 + SLACK, 1.4)
    engine.close()
    engine.check_calls("Abort")


def case_sizes(place: Place) -> None:
    """Both ends of a message that differs in size find out, and nobody else is held up."""
    engine = Engine(place, "sizes", deadline=1.0)
    place.meet()
    if place.rank in (0, 2):
        peer, sizes = 2 - place.rank, (1000, 1000) if place.rank else (1004, 1000)
        raises(lambda: engine.swap({peer: sizes}, [peer]), "took longer", 1.0 + SLACK, 0.9)
    else:
        engine.swap({}, [4 - place.rank])
    engine.close()
    engine.check_calls("Abort" if place.rank in (0, 2) else "Destroy")


def case_order(place: Place) -> None:
    """Two exchanges in another order on one rank."""
    engine = Engine(place, "order", deadline=1.0)
    sizes = (64, 128) if place.rank % 2 else (128, 64)
    peer = place.rank ^ 1
    place.meet()
    raises(lambda: engine.swap({peer: (sizes[0],) * 2}, [peer]), "took longer", 1.0 + SLACK, 0.9)
    raises(lambda: engine.swap({peer: (sizes[1],) * 2}, [peer]), "took longer", SOON)
    engine.close()
    engine.check_calls("Abort")


def case_init_fails(place: Place) -> None:
    """One rank cannot make a communicator, the others wait for it until the deadline."""
    bad = {"init": "fail"} if place.rank == 3 else {}
    what = "forming the communicator " + (
        "failed: unhandled system error" if bad else "took longer"
    )
    raises(lambda: Engine(place, "fails", deadline=1.0, **bad), what, 1.0 + SLACK)
    _check_given_up(place.folder / f"fails.log{place.rank}")


def case_init_hangs(place: Place) -> None:
    """The communicator is never formed."""
    name = "hangs"
    what = "forming the communicator took longer"
    raises(lambda: Engine(place, name, deadline=1.0, init="hang"), what, 1.0 + SLACK)
    _check_given_up(place.folder / f"{name}.log{place.rank}")


def _check_given_up(log: Path) -> None:
    until(lambda: "Abort" in log.read_text())  # in a thread of its own
    calls = [line.split() for line in log.read_text().splitlines()]
    made = sorted(c[1] for c in calls if c[0] == "Init")
    assert made and made == sorted(c[1] for c in calls if c[0] == "Abort"), calls
    assert len(calls) == 2 * len(made), calls


def case_library(place: Place) -> None:
    """A library that cannot be used: one line says why, and another one may be named then."""
    ops, library = operators(), str(place.folder / LIBRARY)
    for path, what in [
        ("/no/such/libnccl.so", "NCCL cannot be loaded: /no/such/libnccl.so: cannot open shared"),
        ("libm.so.6", "NCCL has no function ncclGetVersion"),
    ]:
        for call in (ops.nccl_version, ops.nccl_unique_id):
            assert "\n" not in raises(partial(call, path), what, SOON)
        opening = partial(ops.nccl_open, path, -1, 0, 2, "00" * 128, 0, 1.0)
        assert "\n" not in raises(opening, what, SOON)
    os.environ["MOCK_NCCL_VERSION"] = "21706"
    raises(lambda: ops.nccl_version(library), "NCCL 21706 is too old, 2.18 is needed", SOON)
    os.environ["MOCK_NCCL_VERSION"] = "22809"
    assert ops.nccl_version(library) == 22809
    raises(lambda: ops.nccl_open(library, -1, 0, 2, "ab", 0, 1.0), "identifier", SOON)


CASES = {
    "library": case_library,
    "data": case_data,
    "many": case_many,
    "pairs": case_pairs,
    "error": case_error,
    "hang": case_hang,
    "sizes": case_sizes,
    "order": case_order,
    "aborts": case_aborts,
    "init_fails": case_init_fails,
    "init_hangs": case_init_hangs,
    "abort_hangs": case_abort_hangs,
}
# Threads that NCCL holds are still at work when these end.
LEAVE_THREADS = ("aborts", "init_hangs", "abort_hangs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the stand-in for NCCL."""
    folder = tmp_path_factory.mktemp("nccl")
    compile_shared(SOURCES / "mock_nccl.cpp", folder / LIBRARY)
    return folder


def at_place(mesh: Mesh, name: str, folder: Path) -> None:
    CASES[name](Place(mesh, folder))


@pytest.mark.parametrize("name", CASES)
def test_nccl(folder: Path, name: str) -> None:
    run(1, SIZE, at_place, name, folder, fresh=name in LEAVE_THREADS, transport="gloo")
