"""One rank of a mesh without the other ranks: what it receives is whatever its buffers held.

Memory and traffic of a rank do not depend on the values that travel, so that neither processes nor
a network are needed to measure them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from foldcp.fabric.mesh import Mesh
from foldcp.fabric.policy import Policy
from foldcp.fabric.ranks import Ranks
from foldcp.fabric.transport.base import Exchanges, Transport
from foldcp.fabric.transport.wire import Message


class Nobody:
    """A transport whose messages go nowhere; it takes buffers as the compiled engine does."""

    name = "nobody"
    staged = True

    def __init__(self) -> None:
        self.exchanges = Exchanges()

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
        """Do nothing.

        Args:
            slot: as of a transport.
            sends: as of a transport.
            recvs: as of a transport.
            tag: as of a transport.
            staging: as of a transport.
        """

    def replay(self, *_: Any) -> None:
        """Do nothing."""

    def arrive(self, slot: int) -> None:
        """Do nothing."""

    def land(self) -> None:
        """Do nothing."""

    def abort(self, message: str) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class FakeRanks(Ranks):
    """Ranks of which only one exists."""

    def global_rank(self, rank: int) -> int:
        """Return the rank itself."""
        return rank

    def broadcast_object(self, obj: Any, src: int = 0) -> Any:
        """Return the object, as if every rank had sent the same.

        Args:
            obj: the object.
            src: the rank that has it.
        """
        return obj

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Return the object once per rank, as if every rank had sent the same."""
        return [obj] * self.size


def fake_mesh(
    rows: int,
    cols: int,
    rank: int = 0,
    device: str = "cpu",
    route: str = "direct",
    link: Transport | None = None,
    multiple: int = 0,
    **policy: str,
) -> Mesh:
    """Make one rank of a mesh whose other ranks do not exist.

    Args:
        rows: R.
        cols: Q.
        rank: the one that exists.
        device: where its tensors live.
        route: see `Policy`.
        link: what carries tiles; None takes them nowhere.
        multiple: see `Mesh`.
        policy: see `Policy`.
    """
    many = rows * cols > 1
    ranks = FakeRanks(rank, rows * cols, device, object() if many else None)
    return Mesh(
        rows, cols, ranks, Policy(route, **policy), multiple, link or (Nobody() if many else None)
    )
