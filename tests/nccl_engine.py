"""An engine over the stand-in for NCCL (native/mock_nccl.cpp): a rank of a 2x2 mesh on the CPU."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from native import Place, operators
from torch import Tensor

ROWS, COLS = 2, 2
SIZE = ROWS * COLS
LIBRARY = "libmock_nccl.so"


class Engine:
    """An engine over the stand-in; opening it is collective.

    Args:
        place: this rank. name: of the case, new. deadline: in seconds. behaviour: variables of the
            stand-in on this rank, without their prefix.
    """

    def __init__(self, place: Place, name: str, deadline: float = 20.0, **behaviour: Any) -> None:
        self.ops, self.rank = operators(), place.rank
        self.library = str(place.folder / LIBRARY)
        self.log = place.folder / f"{name}.log{place.rank}"
        os.environ["MOCK_NCCL_DIR"] = str(place.folder)
        os.environ["MOCK_NCCL_LOG"] = str(self.log)
        for variable, value in behaviour.items():
            os.environ[f"MOCK_NCCL_{variable.upper()}"] = str(value)
        mine = [self.ops.nccl_unique_id(self.library) for _ in range(3)]
        ids = [text.split() for text in place.gather(f"{name}.ids", " ".join(mine))]
        row, col = divmod(self.rank, COLS)
        lanes = ids[row * COLS][0], ids[col][1], ids[0][2]
        self.handle = self.ops.nccl_open(
            self.library, -1, self.rank, SIZE, COLS, *lanes, 5, deadline
        )

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

    def check_calls(self, end: str, lanes: int = 3) -> None:
        """Every communicator ended once, by "Destroy" or "Abort", and nothing was misused."""
        calls = self.calls()
        assert not [c for c in calls if c[0] == "misuse"], calls
        made = [c[1] for c in calls if c[0] == "Init"]
        assert len(made) == lanes
        assert all("ctas:5" in c for c in calls if c[0] == "Init")
        ended = Counter(tuple(c[:2]) for c in calls if c[0] in ("Destroy", "Abort"))
        assert ended == Counter((end, serial) for serial in made), calls
        if end == "Destroy":
            last = [c[0] for c in calls if c[0] != "Exchange"][-2 * lanes :]
            assert last == ["Finalize", "Destroy"] * lanes, calls


def _flat(pieces: dict[int, list[tuple[Tensor, bool]]]) -> tuple[list, list, list]:
    flat = [(view, peer, int(fp8)) for peer, of in pieces.items() for view, fp8 in of]
    return [f[0] for f in flat], [f[1] for f in flat], [f[2] for f in flat]
