"""One engine of the compiled extension as a transport; `foldcp.fabric.connect` sets it up."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor

from foldcp.errors import EXCHANGE, TransportError
from foldcp.fabric import message
from foldcp.fabric.ranks import Ranks
from foldcp.fabric.transport.base import Exchanges
from foldcp.fabric.transport.program import Program
from foldcp.fabric.transport.wire import Message
from foldcp_kernels.core.extension import load

_SLICE = 0.5  # seconds that a wait holds the interpreter: signals are handled in between
_WATCH = 0.2  # seconds between two looks for errors, own and those of other ranks


def tag(label: str, step: int) -> int:
    """Number one step of the exchanges of a label, alike on all ranks.

    Args:
        label: of the exchange.
        step: of the exchange.
    """
    return _number(label) << 16 | step & 0xFFFF


@lru_cache(maxsize=1024)
def _number(label: str) -> int:
    return zlib.crc32(label.encode()) & 0x7FFFFFFF


class EngineTransport:
    """One engine of the extension.

    Args:
        name: of the transport.
        ranks: that it joins.
        engine: its number.
    """

    staged = True

    def __init__(self, name: str, ranks: Ranks, engine: int) -> None:
        self.name, self.engine = name, engine
        self.ops, self.exchanges = load().ops, Exchanges()
        self.landed: list[int] = []  # flights of the engine that may be used again
        self._watch = _Watch(self, ranks) if name != "host" else None

    def flight(self) -> EngineFlight:
        """Begin an exchange."""
        return EngineFlight(self)

    def call(self, op: Callable[..., Any], *args: Any) -> Any:
        """Call an operator of the engine; its errors become `TransportError`.

        Args:
            op: the operator.
            args: its arguments after the engine's number.
        """
        try:
            return op(self.engine, *args)
        except RuntimeError as error:
            known = self.error() or str(error).splitlines()[0]
            raise TransportError(f"{EXCHANGE} ({self.name}): {known}") from None

    def error(self) -> str:
        """Return the reason why exchanges fail, "" while they do not."""
        return str(self.ops.engine_error(self.engine))

    def abort(self, message: str) -> None:
        """Make the exchanges of all ranks fail with a message."""
        self.ops.engine_abort(self.engine, message)

    def trace(self, on: bool) -> None:
        """Begin or end recording when transfers run."""
        self.call(self.ops.engine_trace, on)

    def take_trace(self) -> list[tuple[int, ...]]:
        """Take rows of (tag, start, packed, moved, end), times as time.perf_counter_ns()."""
        flat = self.call(self.ops.engine_take_trace)
        return [tuple(flat[i : i + 5]) for i in range(0, len(flat), 5)]

    def close(self) -> None:
        """End; every rank must call it.

        Raises:
            TransportError: what was under way does not end: its memory must not be used again.
        """
        if self._watch is not None:
            self._watch.stop()
        try:
            self.ops.engine_close(self.engine)
        except RuntimeError as error:
            said = str(error).splitlines()[0]
            raise TransportError(f"{EXCHANGE} ({self.name}): {said}") from None


class EngineFlight:
    """One exchange by the engine."""

    def __init__(self, transport: EngineTransport) -> None:
        self._t = transport
        self._ops = ops = transport.ops
        landed = transport.landed
        self._number = landed.pop() if landed else transport.call(ops.flight_open)
        self._fresh = True
        self._kept: dict[int, Any] = {}  # the engine holds pointers, not references

    def post(
        self,
        slot: int,
        sends: Sequence[Message],
        recvs: Sequence[Message],
        tag: int,
        staging: Tensor,
    ) -> None:
        """See `Flight.post`."""
        lists = (*_flat(sends), *_flat(recvs))
        self._kept[slot] = lists, staging
        forwards = any(m.held for m in sends)
        if self._fresh:
            self._t.call(self._ops.flight_begin, self._number)
            self._fresh = False
        self._t.call(self._ops.flight_post, self._number, slot, *lists, staging, tag, forwards)

    def replay(
        self,
        slot: int,
        program: Program,
        step: int,
        bases: Sequence[Tensor | None],
        tag: int,
        staging: Tensor | None,
    ) -> None:
        """See `Flight.replay`."""
        self._kept[slot] = tuple(bases), staging
        ops = self._ops
        handle = program.handles.get("native")
        if handle is None:
            handle = program.kept_by("native", ops.program_add(program.flat()), ops.program_drop)
        at, room = (0, 0) if staging is None else (staging.data_ptr(), staging.numel())
        pointers = [0 if x is None else x.data_ptr() for x in bases]
        fresh, self._fresh = self._fresh, False
        self._t.call(
            ops.flight_replay, self._number, slot, handle, step, pointers, at, room, tag, fresh
        )

    def arrive(self, slot: int) -> None:
        """Wait for a step, see `transport.Flight`."""
        call, arrive = self._t.call, self._ops.flight_await
        while not call(arrive, self._number, slot, _SLICE):
            pass
        self._kept.pop(slot, None)

    def land(self) -> None:
        """Wait for all steps, see `transport.Flight`."""
        for slot in list(self._kept):
            self.arrive(slot)
        self._t.landed.append(self._number)


def _flat(messages: Sequence[Message]) -> tuple[list[Tensor], list[int], list[int]]:
    pieces = [
        (v, m.peer, int(fp8)) for m in messages for v, fp8 in zip(m.views, m.fp8, strict=True)
    ]
    return [p[0] for p in pieces], [p[1] for p in pieces], [p[2] for p in pieces]


class _Watch:
    """Tells the other ranks of an error through the store, and hears of theirs."""

    def __init__(self, transport: EngineTransport, ranks: Ranks) -> None:
        from torch.distributed.distributed_c10d import _get_default_store

        store = _get_default_store()
        # A connection of its own: a call that waits would hold up those of other threads.
        self._store = store.clone() if hasattr(store, "clone") else store
        self._key = f"foldcp/exchange/{ranks.all_gather_object(transport.engine)}/error"
        self._transport, self._rank = transport, ranks.rank
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._over.wait(_WATCH):
                if self._transport.error():
                    self._tell()
                    return
                if self._store.check([self._key]):
                    self._transport.abort(self._told())
                    return
        except RuntimeError:
            return  # the store is gone, and with it the run

    def _told(self) -> str:
        try:
            return message.open_sealed(self._key, self._store.get(self._key)).decode()
        except (message.Forged, UnicodeDecodeError) as error:
            return str(error)

    def _tell(self) -> None:
        text = f"rank {self._rank}: {self._transport.error()}"
        sealed = message.close(self._key, text.encode())
        self._store.compare_set(self._key, "", sealed)  # type: ignore[arg-type]  # takes bytes, too
