"""Carry messages by torch.distributed: gloo on CPU, torch's NCCL on CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from foldcp.fabric.ranks import Ranks
from foldcp.fabric.transport.base import Exchanges
from foldcp.fabric.transport.program import Program
from foldcp.fabric.transport.wire import Message, pack, unpack


class TorchTransport:
    """Messages by torch.distributed: gloo on CPU, torch's NCCL on CUDA.

    Args:
        ranks: their group carries the messages.
    """

    staged = False

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.exchanges = ranks, Exchanges()
        self.name = "torch-nccl" if ranks.device.type == "cuda" else "gloo"

    def flight(self) -> TorchFlight:
        """Begin an exchange."""
        return TorchFlight(self.ranks)

    def abort(self, message: str) -> None:
        """Do nothing: peers notice when this process ends."""

    def close(self) -> None:
        """Do nothing: the process group belongs to the caller that made it."""


class TorchFlight:
    """One exchange by torch.distributed."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._steps: dict[int, tuple[list[Any], list[tuple[Tensor, Message]], list[Tensor]]] = {}

    def post(
        self,
        slot: int,
        sends: Sequence[Message],
        recvs: Sequence[Message],
        tag: int,
        staging: Tensor | None = None,
    ) -> None:
        """See `Flight.post`."""
        device = self.ranks.device
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
        """See `Flight.replay`."""
        self.post(slot, *program.acts[step].messages(bases), tag, staging)

    def _op(self, kind: Any, buffer: Tensor, message: Message) -> dist.P2POp:
        return dist.P2POp(kind, buffer, self.ranks.global_rank(message.peer), self.ranks.group)

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
