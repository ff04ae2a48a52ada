"""One rank of a mesh without the other ranks: what it receives is whatever its buffers held.

Memory and traffic of a rank do not depend on the values that travel, so that neither processes nor
a network are needed to measure them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

import foldcp.exchange
from foldcp.mesh import Mesh


class FakeMesh(Mesh):
    """A rank whose peers do not exist; use it inside `no_peers`."""

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
    rows: int, cols: int, rank: int = 0, device: str = "cpu", route: str = "direct"
) -> FakeMesh:
    """Rank `rank` of a `rows` x `cols` mesh on a device."""
    group = object() if rows * cols > 1 else None
    return FakeMesh(rows, cols, rank, torch.device(device), group, route)


@contextmanager
def no_peers() -> Iterator[None]:
    """Let exchanges post their messages to nobody, with the buffers they would have."""
    nobody = SimpleNamespace(
        isend=None,
        irecv=None,
        P2POp=lambda kind, buffer, peer, group: buffer,
        batch_isend_irecv=lambda buffers: [],
    )
    with mock.patch.object(foldcp.exchange, "dist", nobody):
        yield
