"""Which transport joins the ranks of a mesh, and setting it up.

Whatever can go wrong is agreed on by all ranks: every rank raises the same error, or every rank
goes on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from foldcp.config import TRANSPORTS
from foldcp.native import NativeTransport, tag
from foldcp.transport import TorchTransport, Transport, TransportError
from foldcp.wire import Message, staging_bytes
from foldcp_kernels.extension import load

if TYPE_CHECKING:
    from foldcp.mesh import Mesh

_HOST_BYTES = 64 << 20  # of shared memory for the slots of all pairs of ranks
_WINDOW_BYTES = 128 << 20  # of device memory for the slots of one rank's peers
_MEETING = 120.0  # seconds that setting up and the trial exchange may take
_CUDA = ("nccl", "copy-engine", "torch-nccl")


@dataclass(frozen=True)
class Options:
    """How the transports are set up.

    Args:
        deadline: seconds that an exchange may take. nccl_library: path of NCCL, "" for the one of
            torch or of the system. max_ctas: thread blocks of NCCL per communicator, 0 leaves it to
            NCCL.
    """

    deadline: float = 1800.0
    nccl_library: str = ""
    max_ctas: int = 0


def connect(mesh: Mesh, name: str, options: Options) -> Transport:
    """Set up a transport between the ranks of a mesh.

    Args:
        mesh: of more than one rank. name: one of `transport.TRANSPORTS`; "auto" is host on the CPUs
            of one machine, nccl on GPUs, and torch.distributed where these cannot run (rank 0 says
            why). options: see there.

    Returns:
        The transport, after a trial exchange.

    Raises:
        TransportError: on every rank alike: the transport cannot run here.
        ValueError: unknown name.
    """
    if name not in TRANSPORTS:
        raise ValueError(f"transport must be one of {TRANSPORTS}, got {name!r}")
    for rank, asked in enumerate(mesh.all_gather_object((name, options))):
        if asked != (name, options):
            raise TransportError(
                f"rank {mesh.rank} asks for transport {name} ({options}) and rank {rank} for "
                f"{asked[0]} ({asked[1]}): start all ranks alike"
            )
    cuda = mesh.device.type == "cuda"
    if name in ("gloo", "torch-nccl") or (name != "auto" and _misplaced(name, cuda, options)):
        if _misplaced(name, cuda, options):
            kind = "GPUs" if name in _CUDA else "CPUs"
            raise TransportError(
                f"transport {name} is for {kind}, but this mesh is on {mesh.device.type}: use auto"
            )
        return _torch(mesh)
    wanted = name if name != "auto" else "nccl" if cuda else "host"
    try:
        return _native(mesh, wanted, options)
    except TransportError as error:
        if name != "auto":
            raise
        plain = _torch(mesh)
        if mesh.is_root:
            print(f"foldcp: transport {plain.name} in place of {wanted}: {error}", file=sys.stderr)
        return plain


def _misplaced(name: str, cuda: bool, options: Options) -> bool:
    # A stand-in of NCCL that works on host memory may be named for tests.
    stand_in = name == "nccl" and bool(options.nccl_library)
    return (name in _CUDA) != cuda and not stand_in


def _torch(mesh: Mesh) -> TorchTransport:
    if mesh.device.type == "cuda":
        # NCCL wants every rank in the first call of a group; point-to-point calls come later.
        torch.distributed.all_reduce(torch.zeros(1, device=mesh.device), group=mesh.group)
    return TorchTransport(mesh)


def _native(mesh: Mesh, name: str, options: Options) -> NativeTransport:
    extension = load()
    missing = extension.missing(mesh.device)
    _agree(mesh, name, missing and f"the compiled extension cannot be used ({missing})")
    opening = {"host": _open_host, "nccl": _open_nccl, "copy-engine": _open_copies}[name]
    soon = replace(options, deadline=min(options.deadline, _MEETING))
    transport = NativeTransport(name, mesh, opening(mesh, extension.ops, soon))
    try:
        problem = _try_out(mesh, transport)
    except TransportError as error:
        problem = str(error)
    try:
        _agree(mesh, name, problem)
    except TransportError:
        transport.abort("the trial exchange failed")
        transport.close()
        raise
    extension.ops.engine_deadline(transport.engine, options.deadline)
    return transport


def _agree(mesh: Mesh, name: str, problem: str | None) -> None:
    for rank, theirs in enumerate(mesh.all_gather_object(problem)):
        if theirs:
            raise TransportError(
                f"transport {name} cannot run here, rank {rank}: {theirs}; "
                "use FOLDCP_TRANSPORT=auto"
            )


def _attempt(mesh: Mesh, name: str, make: Callable[[], Any]) -> Any:
    made, problem = None, None
    try:
        made = make()
    except RuntimeError as error:
        problem = str(error).splitlines()[0]
    _agree(mesh, name, problem)
    return made


def machine() -> tuple[str, int]:
    """What processes that see each other under /proc have in common."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip(), os.stat("/proc/self/ns/pid").st_ino


def _open_host(mesh: Mesh, ops: Any, options: Options) -> int:
    if not sys.platform.startswith("linux"):
        _agree(mesh, "host", "it needs Linux")
    machines = mesh.all_gather_object(machine())
    if any(m != machines[0] for m in machines):
        _agree(mesh, "host", "the ranks are not on one machine (or not in one container)")
    slot = max(4 << 10, min(256 << 10, _HOST_BYTES // (4 * mesh.size**2)))
    place = mesh.rank, mesh.size, mesh.cols, slot

    def create(path: str) -> int:
        return ops.host_open(*place, path, options.deadline)

    # Rank 0 makes the segment, the others open it where its process shows its files.
    engine = _attempt(mesh, "host", lambda: create("") if mesh.is_root else -1)
    path = f"/proc/{os.getpid()}/fd/{ops.host_descriptor(engine)}" if mesh.is_root else ""
    path = mesh.broadcast_object(path)
    try:
        joined = _attempt(mesh, "host", lambda: -1 if mesh.is_root else create(path))
    except TransportError:
        if mesh.is_root:
            ops.engine_close(engine)
        raise
    return engine if mesh.is_root else joined


def _open_nccl(mesh: Mesh, ops: Any, options: Options) -> int:
    library = options.nccl_library
    mine = _attempt(mesh, "nccl", lambda: [ops.nccl_unique_id(library) for _ in range(3)])
    ids = mesh.all_gather_object(mine)
    row = ids[mesh.row * mesh.cols][0] if mesh.cols > 1 else ""
    col = ids[mesh.col][1] if mesh.rows > 1 else ""
    rest = ids[0][2] if mesh.rows > 1 and mesh.cols > 1 else ""
    index = -1 if mesh.device.type == "cpu" else mesh.device.index or 0
    place = index, mesh.rank, mesh.size, mesh.cols
    more = options.max_ctas, options.deadline
    return _attempt(mesh, "nccl", lambda: ops.nccl_open(library, *place, row, col, rest, *more))


def _open_copies(mesh: Mesh, ops: Any, options: Options) -> int:
    machines = mesh.all_gather_object(machine())
    if any(m[0] != machines[0][0] for m in machines):
        _agree(mesh, "copy-engine", "the ranks are not on one machine: use nccl")
    slot = max(1 << 20, min(32 << 20, _WINDOW_BYTES // (2 * mesh.size)))
    place = mesh.device.index or 0, mesh.rank, mesh.size, slot
    window = _attempt(mesh, "copy-engine", lambda: ops.copy_window(*place))
    handle = _attempt(mesh, "copy-engine", lambda: ops.copy_handle(window))
    handles = ",".join(mesh.all_gather_object(handle))
    deadline = options.deadline
    return _attempt(
        mesh, "copy-engine", lambda: ops.copy_open(window, handles, mesh.cols, deadline)
    )


def _try_out(mesh: Mesh, transport: NativeTransport) -> str | None:
    """Exchange a few numbers with every rank; says what came out wrong."""
    flight = transport.flight()
    for step in range(3):
        peers = [p for p in range(mesh.size) if p != mesh.rank]
        seen = torch.full((len(peers), 5, 2), -1.0, device=mesh.device)
        mine = torch.arange(10.0, device=mesh.device).view(2, 5).t() + 100 * mesh.rank + step
        sends = [Message(p, (mine,), (False,)) for p in peers]
        recvs = [Message(p, (seen[i],), (False,)) for i, p in enumerate(peers)]
        size = staging_bytes([*sends, *recvs])
        staging = torch.empty(size, dtype=torch.uint8, device=mesh.device)
        flight.post(step % 2, sends, recvs, tag("trial", step), staging)
        flight.arrive(step % 2)
        for i, p in enumerate(peers):
            want = mine + 100 * (p - mesh.rank)
            if not torch.equal(seen[i], want):
                return f"a trial exchange with rank {p} brought wrong numbers"
    flight.land()
    return None
