"""What carries messages between ranks: the interface, and torch.distributed as the plain carrier.

A flight is one exchange under way. Its steps alternate between two slots; the caller keeps the
order post(0), then per step arrive(t), post(t + 1), math of t; land() at the end. What a message
reads and writes must live until its step has arrived, or the flight has landed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from foldcp.fabric.transport.program import Program
from foldcp.fabric.transport.wire import Message, pack, unpack

if TYPE_CHECKING:
    from foldcp.fabric.mesh import Mesh


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
        """Make what was given to this device since then wait for the step in `slot`."""

    def land(self) -> None:
        """Wait likewise for everything that is still under way; the flight is over."""


class Transport(Protocol):
    """Carries the messages of one rank."""

    name: str
    staged: bool  # takes a staging buffer

    def flight(self) -> Flight:
        """Begin an exchange."""

    def abort(self, message: str) -> None:
        """Make every rank's exchanges fail with a message, where the transport can tell them."""

    def close(self) -> None:
        """End; every rank must call it, with nothing under way."""


class TorchTransport:
    """Messages by torch.distributed: gloo on CPU, torch's NCCL on CUDA.

    Args:
        mesh: of ranks; its group carries the messages.
    """

    staged = False

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.name = "torch-nccl" if mesh.device.type == "cuda" else "gloo"

    def flight(self) -> TorchFlight:
        """Begin an exchange."""
        return TorchFlight(self.mesh)

    def abort(self, message: str) -> None:
        """Nothing: peers notice when this process ends."""

    def close(self) -> None:
        """Nothing: the process group belongs to who made it."""


class TorchFlight:
    """One exchange by torch.distributed."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self._steps: dict[int, tuple[list[Any], list[tuple[Tensor, Message]], list[Tensor]]] = {}

    def post(
        self,
        slot: int,
        sends: Sequence[Message],
        recvs: Sequence[Message],
        tag: int,
        staging: Tensor | None = None,
    ) -> None:
        """Start a step, see `Flight`."""
        device = self.mesh.device
        outbox = [pack(m, device) for m in sends]
        inbox = [torch.empty(m.bytes(), dtype=torch.uint8, device=device) for m in recvs]
        ops = [self._op(dist.isend, x, m) for x, m in zip(outbox, sends, strict=True)]
        ops += [self._op(dist.irecv, x, m) for x, m in zip(inbox, recvs, strict=True)]
        works = dist.batch_isend_irecv(ops) if ops else []
        self._steps[slot] = works, list(zip(inbox, recvs, strict=True)), outbox

    def replay(
        self,
        slot: int,
        program: Program,
        step: int,
        bases: Sequence[Tensor | None],
        tag: int,
        staging: Tensor | None,
    ) -> None:
        """Start a step of a program, see `Flight`."""
        self.post(slot, *program.acts[step].messages(bases), tag, staging)

    def _op(self, kind: Any, buffer: Tensor, message: Message) -> dist.P2POp:
        return dist.P2POp(kind, buffer, self.mesh.global_rank(message.peer), self.mesh.group)

    def arrive(self, slot: int) -> None:
        """Wait for a step, see `Flight`."""
        works, inbox, _outbox = self._steps.pop(slot, ([], [], []))
        for work in works:
            work.wait()
        for buffer, message in inbox:
            unpack(buffer, message)

    def land(self) -> None:
        """Wait for all steps, see `Flight`."""
        for slot in list(self._steps):
            self.arrive(slot)
