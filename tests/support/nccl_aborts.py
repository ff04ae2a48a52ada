"""Cases of fabric/test_nccl.py: aborts that wait for other kernels of the GPU, or never end."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
from native import Place
from nccl_engine import SIZE, SLACK, SOON, Engine, Waiting, ends, until
from torch.distributed import HashStore

from foldcp.errors import TransportError
from foldcp.fabric.transport.engine_transport import EngineTransport
from foldcp.runtime.session import Session


def case_aborts(place: Place) -> None:
    """Two meshes of one process wait for a rank: no abort waits for the other mesh's kernel."""
    for version in (22907, 21805):
        name = f"aborts{version}"
        engines = [Engine(place, f"{name}.{i}", version=version) for i in range(2)]
        place.meet()
        if place.rank != 3:
            waiting = [Waiting(lambda e=e: e.swap({}, [3])) for e in engines]
            until(lambda e=engines[1]: e.log.read_text().count("Exchange") == 2)
            for engine in engines:
                ends(lambda e=engine: e.ops.engine_abort(e.handle, "rank 3 is lost"), SOON)
            assert [thread.error() for thread in waiting] == ["rank 3 is lost"] * 2
            for engine in engines:
                ends(engine.close, SLACK)
            ended = [c for c in engines[1].calls() if c[0] in ("Abort", "misuse")]
            assert [c[0] for c in ended] == ["Abort"] * 2, ended
            # Where NCCL takes no aborts in a group, they are begun at once.
            assert (ended[0][2] == ended[1][2]) == (version >= 22200), ended
        place.meet()
        if place.rank == 3:
            for engine in engines:
                engine.ops.engine_abort(engine.handle, "")
                engine.close()


class _Beats:
    """Stands for foldcp.runtime.liveness.peers.Peers."""

    count = 0

    def beat(self) -> None:
        self.count += 1

    def lost(self, after: int, patience: float) -> None:
        return None


def case_abort_hangs(place: Place) -> None:
    """An abort that never ends: the rank goes on telling that it lives, and its closing says so."""
    engine = Engine(place, "endless", deadline=1.0, abort="hang")
    session, store = Session.__new__(Session), HashStore()
    link = EngineTransport.__new__(EngineTransport)
    link.name, link.engine, link.ops, link._watch = "nccl", engine.handle, engine.ops, None
    session.place, session.peers = SimpleNamespace(rank=place.rank, world=SIZE), _Beats()
    session.mesh, session.patience, session._heard = SimpleNamespace(link=link), 100.0, ""
    session.group = session.epoch = 0
    session._watched, session._over = store, threading.Event()
    waiting = Waiting(lambda: engine.swap({}, [(place.rank + 1) % SIZE]))
    watcher = threading.Thread(target=session._watch, daemon=True)
    watcher.start()
    store.set(session.fault_key, "1")
    assert waiting.error() == "another rank drops this input"
    before = session.peers.count
    until(lambda: session.peers.count >= before + 3)
    session._over.set()
    with pytest.raises(TransportError, match="aborting the communicator has not ended within 1 s"):
        link.close()
    place.meet()
