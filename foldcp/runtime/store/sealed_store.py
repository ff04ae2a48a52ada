"""The launcher's store with sealed values: a value that another program wrote is refused.

Counters stay as they are: whoever reaches the port can end a run with one, and do no more.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from torch.distributed import PrefixStore, Store

from foldcp.fabric import message

if TYPE_CHECKING:
    from foldcp.runtime.liveness.guard import Guard


class SealedStore(PrefixStore):
    """A store in which values of one run have a prefix and a seal.

    Torch's own code, which is given the store for its connections, uses it without seals. Whatever
    this class is asked for is watched by the guard of this process.

    Args:
        prefix: of this run's keys.
        store: the store.
        guard: of this process.
        named: whose store it is, for messages.
    """

    def __init__(self, prefix: str, store: Store, guard: Guard, named: str) -> None:
        super().__init__(prefix, store)
        self._prefix, self._guard, self._named = prefix, guard, named

    def put(self, key: str, value: Any) -> None:
        """Keep a value under a key, see `message.encode`.

        Args:
            key: names the value.
            value: what `message.encode` takes.
        """
        sealed = message.pack(value, self._context(key))
        with self._guard.asking(self._named):
            super().set(key, sealed)  # type: ignore[arg-type]  # takes bytes, too

    def take(self, key: str) -> Any:
        """Take the value that `put` stored.

        Raises:
            Forged: no rank of this run wrote it.
        """
        with self._guard.asking(self._named):
            sealed = super().get(key)
        return message.unpack(sealed, self._context(key))

    def set(self, key: str, value: str) -> None:
        """Keep a text.

        Args:
            key: names the text.
            value: the text.
        """
        sealed = message.close(self._context(key), value.encode())
        with self._guard.asking(self._named):
            super().set(key, sealed)  # type: ignore[arg-type]

    def get(self, key: str) -> bytes:
        """Return the text that `set` or `compare_set` stored.

        Raises:
            Forged: no rank of this run wrote it.
        """
        with self._guard.asking(self._named):
            sealed = super().get(key)
        return message.open_sealed(self._context(key), sealed)

    def check(self, keys: list[str]) -> bool:
        """Tell whether there is a value under each of these keys."""
        with self._guard.asking(self._named):
            return super().check(keys)

    def add(self, key: str, amount: int) -> int:
        """Add to a counter; returns its new value.

        Args:
            key: names the counter.
            amount: to add.
        """
        with self._guard.asking(self._named):
            return super().add(key, amount)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Keep a text if there is none; `expected` must be "". Returns what is there.

        Args:
            key: names the text.
            expected: "".
            desired: the text to store.

        Raises:
            Forged: no rank of this run wrote it.
        """
        assert expected == "", "a seal cannot be compared with a text"
        context = self._context(key)
        with self._guard.asking(self._named):
            sealed = message.close(context, desired.encode())
            there = super().compare_set(key, "", sealed)  # type: ignore[arg-type]
        return message.open_sealed(context, there)

    def _context(self, key: str) -> str:
        return f"{self._prefix}/{key}"


def is_loopback(host: str) -> bool:
    """Tell whether a host's name means this machine to itself only."""
    return host in ("localhost", "::1") or host.startswith("127.")


def listen(host: str, port: int) -> int | None:
    """Listen for ranks of this machine only, where all of them are on it.

    Args:
        host: machine that serves the store.
        port: port of the store.

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
