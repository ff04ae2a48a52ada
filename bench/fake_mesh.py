"""One rank of a mesh without the other ranks: what it receives is whatever its buffers held.

Memory and traffic of a rank do not depend on the values that travel, so that neither processes nor
a network are needed to measure them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foldcp.fabric.mesh import Mesh
from foldcp.fabric.transport.wire import Message


class Nobody:
    """A transport whose messages go nowhere; it takes buffers as the compiled engine does."""

    name = "nobody"
    staged = True

    def flight(self) -> Nobody:
        """Begin an exchange."""
        return self

    def post(
        self,
        slot: int,
        sends: Sequence[Message],
        recvs: Sequence[Message],
        tag: int,
        staging: Tensor,
    ) -> None:
        """Nothing."""

    def replay(self, *_: Any) -> None:
        """Nothing."""

    def arrive(self, slot: int) -> None:
        """Nothing."""

    def land(self) -> None:
        """Nothing."""

    def abort(self, message: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class FakeMesh(Mesh):
    """A rank whose peers do not exist."""

    def global_rank(self, rank: int) -> int:
        """Ranks of a fake mesh are their own."""
        return rank

    def broadcast_object(self, obj: Any, src: int = 0) -> Any:
        """Every rank is taken to have sent the same object."""
        return obj

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Every rank is taken to have the same object."""
        return [obj] * self.size


def fake_mesh(
    rows: int, cols: int, rank: int = 0, device: str = "cpu", route: str = "direct", **policy: str
) -> FakeMesh:
    """Rank `rank` of a `rows` x `cols` mesh on a device; `policy` as of `Mesh.create`."""
    many = rows * cols > 1
    group, link = (object(), Nobody()) if many else (None, None)
    return FakeMesh(rows, cols, rank, torch.device(device), group, route, link=link, **policy)
