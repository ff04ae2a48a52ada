"""The ranks as they see each other: which ones run, what each one is doing, which are lost.

Every rank publishes where its process lives and, about once a second, a beat with the stage that it
is in. Ranks of one machine see at once that a process has ended or is stopped; of others only that
their beats have ceased.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from foldcp.errors import on_disk
from foldcp.fabric.machine import machine
from foldcp.fabric.message import Forged
from foldcp.runtime.place import Place

_BEAT = 1.0  # seconds between two beats
_SILENT = 2.5  # seconds without a beat after which a rank is called silent
_GONE, _STOPPED, _RUNNING = "gone", "stopped", "running"


@dataclass(frozen=True)
class _Process:
    """Process of a rank; `started` distinguishes it from a later one with the same number."""

    host: str
    pid: int
    started: str

    @classmethod
    def here(cls, pid: int) -> _Process:
        return cls(_host(), pid, (_stat(pid) or ("", ""))[1])

    def state(self) -> str:
        """Return the state of a process that this one can see; "running" for any other."""
        if self.host != _host() or not self.started:
            return _RUNNING
        found = _stat(self.pid)
        if found is None or found[1] != self.started or found[0] in "ZX":
            return _GONE
        return _STOPPED if found[0] in "Tt" else _RUNNING

    def wake(self) -> None:
        """Let a stopped process go on."""
        if self.state() == _STOPPED:
            with suppress(OSError):
                os.kill(self.pid, signal.SIGCONT)


def _host() -> str:
    return "/".join(map(str, machine()))


def _stat(pid: int) -> tuple[str, str] | None:
    """(state letter, start time) of a process; None when there is none, or no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], fields[19]


class Peers:
    """This rank's view of the others, through the launcher's store.

    Args:
        store: a connection of its own, which no other use may hold up.
        place: this process among the ranks.
        stage: what it is doing.
        clock: seconds that this process has run.
        waiting: tells whether it waits for others in an exchange.
    """

    def __init__(
        self,
        store: Any,
        place: Place,
        stage: Callable[[], str],
        clock: Callable[[], float],
        waiting: Callable[[], bool],
    ) -> None:
        self._store, self._place, self._clock = store, place, clock
        self._waiting, self._failed = waiting, False
        self._stage, self._beats, self._next = stage, 0, 0.0
        self._seen: dict[int, tuple[str, float]] = {}
        self._processes: dict[int, _Process] = {}
        # Torch's launcher starts each rank itself, and one that serves the store is on its machine.
        self._launcher = _Process.here(os.getppid()) if place.agent_store else None
        store.set(f"peer/{place.rank}", json.dumps(asdict(_Process.here(os.getpid()))))
        self.beat()

    def beat(self, now: bool = False) -> None:
        """Publish the stage if a beat is due, or now."""
        time_now = time.monotonic()
        if now or time_now >= self._next:
            self._beats, self._next = self._beats + 1, time_now + _BEAT
            beat = f"{self._beats} {int(self._failed or self._waiting())} {self._stage()}"
            self._store.set(f"beat/{self._place.rank}", beat)
            others = [r for r in range(self._place.world) if r != self._place.rank]
            unknown = [rank for rank in others if rank not in self._processes]
            for rank in {others[self._beats % len(others)], *unknown[:4]}:
                self._look(rank)  # for when nobody can be asked any more

    def account(self, what: str) -> str:
        """Explain why all ranks end, and which ones have ended or stopped, as seen from here.

        Nobody is asked. Of ranks that this one has not looked at yet nothing is known.

        Args:
            what: happened to this rank.
        """
        how = {_GONE: "is gone (its process has ended)", _STOPPED: "is stopped (SIGSTOP)"}
        known = [(self._named(r), process) for r, process in sorted(self._processes.items())]
        if self._launcher is not None:
            known.append((f"the launcher (process {self._launcher.pid})", self._launcher))
        states = [(name, process.state()) for name, process in known]
        lost = "; ".join(f"{name} {how[state]}" for name, state in states if state in how)
        data = f"rank {self._place.rank} (in {self._stage()}) {what}"
        return f"{data}{lost and ': '}{lost}, all ranks end; {on_disk()}"

    def lost_store(self) -> str:
        """Word this rank's message when it can no longer reach the store."""
        return self.account(f"lost {self._place.server}, which served the store")

    def wake(self) -> None:
        """Let ranks and a launcher that are stopped go on, where this machine shows them.

        All the others end: it is for them to notice, and to end as well.
        """
        launcher = [self._launcher] if self._launcher is not None else []
        for process in (*launcher, *self._processes.values()):
            process.wake()

    def lost(self, rank: int, patience: float) -> str | None:
        """Return the reason why a rank is given up; None while it is not.

        Args:
            rank: to look at.
            patience: seconds that it may be silent.
        """
        state, silent = self._look(rank)
        if state == _GONE:
            return (
                f"{self._named(rank)} is gone: its process was killed (most often for lack of "
                "memory)"
            )
        if silent <= patience:
            return None
        how = "is stopped (SIGSTOP)" if state == _STOPPED else "does not answer"
        return f"{self._named(rank)} {how} and was waited for {silent:.0f} s (FOLDCP_TIMEOUT)"

    def missing(self) -> list[str]:
        """List all other ranks that have ended, stopped or gone silent; takes a few seconds.

        If all are alive, the ones that the others wait for. This rank's exchange has failed: from
        now on it is none of those.
        """
        self._failed = True
        others = [r for r in range(self._place.world) if r != self._place.rank]
        for rank in others:
            self._look(rank)
        until = time.monotonic() + _SILENT
        while time.monotonic() < until and not any(self._look(r)[0] != _RUNNING for r in others):
            if self._store.check(["failed"]):
                return []  # another rank says it
            self.beat()
            time.sleep(_BEAT / 4)
        found = []
        for rank in others:
            state, silent = self._look(rank)
            beats = not self._store.check([f"departed/{rank}"])
            if state != _RUNNING or (beats and silent > _SILENT - 0.1):
                how = {_GONE: "is gone (killed)", _STOPPED: "is stopped (SIGSTOP)"}
                found.append(f"{self._named(rank)} {how.get(state, 'does not answer')}")
        return found or self._behind(others)

    def _behind(self, others: list[int]) -> list[str]:
        busy = [rank for rank in others if self._beat(rank).split()[1:2] == ["0"]]
        if len(busy) == len(others):
            return []
        return [f"{self._named(rank)} does not go on: others wait for it" for rank in busy]

    def _beat(self, rank: int) -> str:
        return self._seen.get(rank, ("", 0.0))[0]

    def gone(self) -> str | None:
        """Return the first rank of this machine whose process has ended; None while all run."""
        for rank in range(self._place.world):
            if rank != self._place.rank and self._look(rank)[0] == _GONE:
                return self.lost(rank, 0.0)
        return None

    def _look(self, rank: int) -> tuple[str, float]:
        """(state of a rank's process, seconds since its beat changed as seen from here)."""
        now = self._clock()
        key = f"beat/{rank}"
        beat = self._store.get(key).decode(errors="replace") if self._store.check([key]) else ""
        if rank not in self._seen or self._beat(rank) != beat:
            self._seen[rank] = beat, now
        return self._process(rank).state(), now - self._seen[rank][1]

    def _process(self, rank: int) -> _Process:
        if rank not in self._processes:
            if not self._store.check([f"peer/{rank}"]):
                return _Process("", 0, "")
            try:
                data = json.loads(self._store.get(f"peer/{rank}"))
                found = _Process(str(data["host"]), int(data["pid"]), str(data["started"]))
            except (ValueError, TypeError, KeyError) as error:
                raise Forged(f"peer/{rank}", "it names no process") from error
            self._processes[rank] = found
        return self._processes[rank]

    def _named(self, rank: int) -> str:
        stage = " ".join(self._beat(rank).split()[2:])
        return f"rank {rank} (in {stage})" if stage else f"rank {rank}"
