"""An engine over the stand-in for NCCL (native/mock_nccl.cpp): one of four ranks on the CPU."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from native import Place, operators
from torch import Tensor

from foldcp.config import order_nccl

SIZE = 4
SOON = 0.5  # seconds; what is cut short takes no longer, whatever the deadline is
SLACK = 3.0  # seconds that a busy machine may add to a deadline
LIBRARY = "libmock_nccl.so"


class Engine:
    """An engine over the stand-in; opening it is collective.

    Args:
        place: this rank.
        name: of the case, new.
        deadline: in seconds.
        behaviour: variables of the stand-in on this rank, without their prefix.
    """

    def __init__(self, place: Place, name: str, deadline: float = 20.0, **behaviour: Any) -> None:
        self.ops, self.rank = operators(), place.rank
        self.library = str(place.folder / LIBRARY)
        self.log = place.folder / f"{name}.log{place.rank}"
        os.environ["MOCK_NCCL_DIR"] = str(place.folder)
        os.environ["MOCK_NCCL_LOG"] = str(self.log)
        for variable, value in behaviour.items():
            os.environ[f"MOCK_NCCL_{variable.upper()}"] = str(value)
        order_nccl(os.environ)
        mine = self.ops.nccl_unique_id(self.library) if self.rank == 0 else ""
        identifier = place.gather(mine)[0]
        self.handle = self.ops.nccl_open(self.library, -1, self.rank, SIZE, identifier, 5, deadline)

    def post(self, flight: int, slot: int, sends: dict, recvs: dict) -> None:
        """Start a step; `sends` and `recvs`: (view, FP8) of each peer."""
        staging = torch.zeros(1 << 16, dtype=torch.uint8)
        self.kept = [*getattr(self, "kept", ()), sends, recvs, staging]  # the engine has pointers
        lists = (*_flat(sends), *_flat(recvs))
        self.ops.flight_post(self.handle, flight, slot, *lists, staging, 1)

    def swap(self, sizes: dict[int, tuple[int, int]], peers: Iterable[int] | None = None) -> None:
        """One exchange of bytes with peers; `sizes[peer]`: sent and received, 1000 unless given."""
        flight = self.ops.flight_open(self.handle)
        others = [p for p in range(SIZE) if p != self.rank] if peers is None else peers
        sends, recvs = {}, {}
        for peer in others:
            out, into = sizes.get(peer, (1000, 1000))
            sends[peer] = [(torch.full((out,), self.rank, dtype=torch.uint8), False)]
            recvs[peer] = [(torch.full((into,), 99, dtype=torch.uint8), False)]
        self.post(flight, 0, sends, recvs)
        self.ops.flight_arrive(self.handle, flight, 0)
        self.ops.flight_land(self.handle, flight)
        for peer, pieces in recvs.items():
            assert (pieces[0][0] == peer).all()

    def close(self) -> None:
        """End it."""
        self.ops.engine_close(self.handle)

    def calls(self) -> list[list[str]]:
        """What was called, a list of words per call."""
        return [line.split() for line in self.log.read_text().splitlines()]

    def check_calls(self, end: str) -> None:
        """The communicator ended once, by "Destroy" or "Abort", and nothing was misused."""
        calls = self.calls()
        assert not [c for c in calls if c[0] == "misuse"], calls
        made = [c for c in calls if c[0] == "Init"]
        assert len(made) == 1 and "ctas:5" in made[0]
        ended = [c[:2] for c in calls if c[0] in ("Destroy", "Abort")]
        assert ended == [[end, made[0][1]]], calls
        if end == "Destroy":
            last = [c[0] for c in calls if c[0] != "Exchange"][-2:]
            assert last == ["Finalize", "Destroy"], calls


def raises(act: Callable[[], Any], text: str, most: float, least: float = 0.0) -> str:
    """The error of `act`, which contains a text and comes within some seconds."""
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=text) as caught:
        act()
    took = time.monotonic() - start
    assert least <= took <= most, f"took {took:.2f} s, expected {least} to {most} s"
    return str(caught.value)


class Waiting:
    """Runs something that fails, and says how."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self._act, self._error = act, "it did not fail"
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._act()
        except RuntimeError as error:
            self._error = str(error)

    def error(self) -> str:
        """What it failed with."""
        self._thread.join(30)
        return "it did not end" if self._thread.is_alive() else self._error


def until(true: Callable[[], bool]) -> None:
    """Wait for something that becomes true."""
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def ends(act: Callable[[], Any], seconds: float) -> None:
    """Fails when `act` has not ended in time."""
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"not done within {seconds} s"


def _flat(pieces: dict[int, list[tuple[Tensor, bool]]]) -> tuple[list, list, list]:
    flat = [(view, peer, int(fp8)) for peer, of in pieces.items() for view, fp8 in of]
    return [f[0] for f in flat], [f[1] for f in flat], [f[2] for f in flat]
