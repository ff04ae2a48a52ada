"""Name what carries messages between ranks: the interface of every transport.

A flight is one exchange under way. Its steps alternate between two slots; the caller keeps the
order post(0), then per step arrive(t), post(t + 1), math of t; land() at the end. What a message
reads and writes must live until its step has arrived, or the flight has landed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from foldcp.fabric.transport.program import Program
from foldcp.fabric.transport.wire import Message


class Exchanges:
    """State of the exchanges over one link.

    Attributes:
        waiting: this rank waits for others: when all the others do, it is the one they wait for.
        broken: exchanges that an error left unfinished. The transport may write into their memory
            until it is closed.
    """

    def __init__(self) -> None:
        self.waiting = False
        self.broken: list[Any] = []


class Flight(Protocol):
    """One exchange under way."""

    def post(
        self,
        slot: int,
        sends: Sequence[Message],
        recvs: Sequence[Message],
        tag: int,
        staging: Tensor,
    ) -> None:
        """Start a step.

        Args:
            slot: 0 or 1, the one that the step before does not use.
            sends: messages to send; both ends list those between them in one order.
            recvs: messages to receive, in the same order.
            tag: names exchange and step, alike on both ends.
            staging: uint8, at least `wire.staging_bytes` of all messages, kept until it arrived.
        """

    def replay(
        self,
        slot: int,
        program: Program,
        step: int,
        bases: Sequence[Tensor | None],
        tag: int,
        staging: Tensor | None,
    ) -> None:
        """Start a step of a program.

        Args:
            slot: as of `post`.
            program: the program.
            step: index of its step.
            bases: the tensors that it names, kept until it arrived.
            tag: as of `post`.
            staging: as of `post`; None where nothing is packed.
        """

    def arrive(self, slot: int) -> None:
        """Make work queued on this device from now on wait for the step in `slot`."""

    def land(self) -> None:
        """Make it wait for all steps that are still in flight, and end the flight."""


class Transport(Protocol):
    """Carries the messages of one rank."""

    name: str
    staged: bool  # takes a staging buffer
    exchanges: Exchanges

    def flight(self) -> Flight:
        """Begin an exchange."""

    def abort(self, message: str) -> None:
        """Make every rank's exchanges fail with a message, where the transport can tell them."""

    def close(self) -> None:
        """End; every rank must call it, with nothing under way."""
