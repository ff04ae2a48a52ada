"""A meeting place for the ranks of one machine: a store that other machines cannot reach.

The store of torch's own launcher listens on all interfaces, and its agent unpickles what it finds
there.
"""

from __future__ import annotations

import secrets
import socket
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

BACKEND = "foldcp"  # for torch's launcher: --rdzv-backend
_HOST = "127.0.0.1"


class Loopback(RendezvousHandler):
    """The meeting of one agent, which serves the store of its ranks.

    Args:
        run_id: of torch's launcher.
        seconds: that a rank waits for the store.
    """

    def __init__(self, run_id: str, seconds: float) -> None:
        self._run_id = run_id
        listener = socket.create_server((_HOST, 0), backlog=1024)
        self._port = listener.getsockname()[1]
        self._store = TCPStore(
            _HOST,
            self._port,
            is_master=True,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )

    def get_backend(self) -> str:
        """Name of this kind of meeting."""
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        """The ranks use the agent's store."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Return the rendezvous of the agent, which is alone."""
        place = RendezvousStoreInfo(_HOST, self._port)
        return RendezvousInfo(PrefixStore(self._run_id, self._store), 0, 1, place)

    def is_closed(self) -> bool:
        """Return False: the run ends with its ranks."""
        return False

    def set_closed(self) -> None:
        """Do nothing: nobody else would join."""

    def num_nodes_waiting(self) -> int:
        """Return 0: nobody else joins."""
        return 0

    def get_run_id(self) -> str:
        """Name of the run."""
        return self._run_id

    def shutdown(self) -> bool:
        """Do nothing: the store ends with this process."""
        return True


def _create(parameters: RendezvousParameters) -> Loopback:
    return Loopback(parameters.run_id, parameters.get_as_int("timeout", 600) or 600)


def stay_on_this_machine(environ: Any) -> list[str]:
    """Keep the meeting of the ranks started next out of reach of other machines and users.

    Args:
        environ: of the ranks, usually `os.environ`: gets the secret of this run, and the interface
            that gloo listens on.

    Returns:
        Arguments of torch's launcher.
    """
    rendezvous_handler_registry.register(BACKEND, _create)
    environ["FOLDCP_SECRET"] = secrets.token_hex(32)
    keep_gloo_here(environ)
    return ["--rdzv-backend", BACKEND]


def keep_gloo_here(environ: Any) -> None:
    """Make gloo listen on the loopback interface, if there is one."""
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if names:
        environ["GLOO_SOCKET_IFNAME"] = names[0]
