"""The launcher's store with sealed values: what another program writes there is noticed, not read.

Counters stay as they are: whoever reaches the port can end a run with one, and do no more.
"""

from __future__ import annotations

import socket
from typing import Any

from torch.distributed import PrefixStore, Store

from foldcp import message


class SealedStore(PrefixStore):
    """A store in which values of one run have a prefix and a seal.

    Torch's own code, which is given the store for its connections, uses it without seals.

    Args:
        prefix: of this run's keys. store: the store.
    """

    def __init__(self, prefix: str, store: Store) -> None:
        super().__init__(prefix, store)
        self._prefix = prefix

    def put(self, key: str, value: Any) -> None:
        """Keep a value under a key, see `message.encode`."""
        super().set(key, message.pack(value, self._context(key)))

    def take(self, key: str) -> Any:
        """The value that `put` was given.

        Raises:
            Forged: no rank of this run wrote it.
        """
        return message.unpack(super().get(key), self._context(key))

    def set(self, key: str, value: str) -> None:
        """Keep a text."""
        super().set(key, message.close(self._context(key), value.encode()))

    def get(self, key: str) -> bytes:
        """The text that `set` or `compare_set` was given.

        Raises:
            Forged: no rank of this run wrote it.
        """
        return message.open_sealed(self._context(key), super().get(key))

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Keep a text if there is none; `expected` must be "". Returns what is there.

        Raises:
            Forged: no rank of this run wrote it.
        """
        assert expected == "", "a seal cannot be compared with a text"
        context = self._context(key)
        there = super().compare_set(key, "", message.close(context, desired.encode()))
        return message.open_sealed(context, there)

    def _context(self, key: str) -> str:
        return f"{self._prefix}/{key}"


def is_loopback(host: str) -> bool:
    """True when a host's name means this machine to itself only."""
    return host in ("localhost", "::1") or host.startswith("127.")


def listen(host: str, port: int) -> int | None:
    """Listen for ranks of this machine only, where all of them are on it.

    Args:
        host, port: of the store.

    Returns:
        A socket's number to serve the store on; None when other machines must reach it.

    Raises:
        OSError: the port is taken.
    """
    if not is_loopback(host):
        return None
    family = socket.AF_INET6 if host == "::1" else socket.AF_INET
    # Torch's server closes the socket.
    return socket.create_server((host, port), family=family, backlog=1024).detach()
