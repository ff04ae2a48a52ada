"""Choose the transport that joins ranks, set it up and try it out.

Whatever can go wrong is agreed on by all ranks: every rank raises the same error, or every rank
goes on.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from foldcp.config import TRANSPORTS, Config, order_nccl, shares_gpus
from foldcp.errors import TransportError
from foldcp.fabric.machine import machine
from foldcp.fabric.message import known
from foldcp.fabric.ranks import Ranks
from foldcp.fabric.transport.base import Transport
from foldcp.fabric.transport.engine_transport import EngineTransport, tag
from foldcp.fabric.transport.torch_transport import TorchTransport
from foldcp.fabric.transport.wire import Message, staging_bytes
from foldcp_kernels.core.extension import load

_HOST_BYTES = 64 << 20  # of shared memory for the slots of all pairs of ranks
_WINDOW_BYTES = 128 << 20  # of device memory for the slots of one rank's peers
_MEETING = 120.0  # seconds that setting up and the trial exchange may take
_MARK, _MARK_AT = 32, 512  # bytes of a mark, and where it stands: in room for a message of errors
_SEGMENT = re.compile(r"/proc/\d+/fd/\d+")
_CUDA = ("nccl", "copy-engine", "torch-nccl")
# Bytes of the trial with each peer. Links between GPUs may corrupt from 256 KiB up; in shared
# memory nothing but the slots, of 256 KiB at most, is to be tried.
_TRIAL = {"host": 512 << 10, "nccl": 4 << 20, "copy-engine": 4 << 20}
_REMEDY = {
    "nccl": ": copies between the GPUs do not work, mostly for IOMMU or ACS settings. Set "
    "NCCL_P2P_DISABLE=1, or disable ACS (or the IOMMU) in the BIOS",
    "copy-engine": ": copies between the GPUs do not work, mostly for IOMMU or ACS settings. Set "
    "FOLDCP_TRANSPORT=nccl with NCCL_P2P_DISABLE=1, or disable ACS (or the IOMMU) in the BIOS",
}
_SHARED_GPU = 23000  # the first NCCL that takes several ranks on one GPU


@known
@dataclass(frozen=True)
class Options:
    """Settings of the transports.

    Args:
        deadline: seconds that an exchange may take.
        nccl_library: path of NCCL, "" for the one of torch or of the system.
        max_ctas: most thread blocks of NCCL, 0 leaves it to NCCL.
    """

    deadline: float = 1800.0
    nccl_library: str = ""
    max_ctas: int = Config.nccl_ctas


def connect(ranks: Ranks, name: str, options: Options) -> Transport:
    """Set up a transport between the ranks of a mesh.

    Args:
        ranks: more than one.
        name: one of `foldcp.config.TRANSPORTS`; "auto" is host on the CPUs of one machine, nccl on
            GPUs, and torch.distributed where these cannot run (rank 0 prints why).
        options: how to set it up.

    Returns:
        The transport, after a trial exchange.

    Raises:
        TransportError: on every rank alike: the transport cannot run here.
        ValueError: unknown name.
    """
    if name not in TRANSPORTS:
        raise ValueError(f"transport must be one of {TRANSPORTS}, got {name!r}")
    for rank, asked in enumerate(ranks.all_gather_object((name, options))):
        if asked != (name, options):
            raise TransportError(
                f"rank {ranks.rank} asks for transport {name} ({options}) and rank {rank} for "
                f"{asked[0]} ({asked[1]}): start all ranks alike"
            )
    cuda = ranks.device.type == "cuda"
    if cuda or name == "nccl":
        order_nccl(os.environ)
    if name in ("gloo", "torch-nccl") or (name != "auto" and _misplaced(name, cuda, options)):
        if _misplaced(name, cuda, options):
            kind = "GPUs" if name in _CUDA else "CPUs"
            raise TransportError(
                f"transport {name} is for {kind}, but this mesh is on {ranks.device.type}: use auto"
            )
        return _torch(ranks)
    wanted = name if name != "auto" else "nccl" if cuda else "host"
    try:
        return _engine(ranks, wanted, options)
    except TransportError as error:
        if name != "auto":
            raise
        plain = _torch(ranks)
        if ranks.is_root:
            print(f"foldcp: transport {plain.name} in place of {wanted}: {error}", file=sys.stderr)
        return plain


def _misplaced(name: str, cuda: bool, options: Options) -> bool:
    # A stand-in of NCCL that works on host memory may be named for tests.
    stand_in = name == "nccl" and bool(options.nccl_library)
    return (name in _CUDA) != cuda and not stand_in


def _torch(ranks: Ranks) -> TorchTransport:
    if ranks.device.type == "cuda":
        # NCCL wants every rank in the first call of a group; point-to-point calls come later.
        torch.distributed.all_reduce(torch.zeros(1, device=ranks.device), group=ranks.group)
    return TorchTransport(ranks)


def _engine(ranks: Ranks, name: str, options: Options) -> EngineTransport:
    extension = load()
    missing = extension.missing(ranks.device)
    _agree(ranks, name, missing and f"the compiled extension cannot be used ({missing})")
    opening = {"host": _open_host, "nccl": _open_nccl, "copy-engine": _open_copies}[name]
    soon = replace(options, deadline=min(options.deadline, _MEETING))
    transport = EngineTransport(name, ranks, opening(ranks, extension.ops, soon))
    try:
        problem = _try_out(ranks, transport)
    except TransportError as error:
        problem = str(error)
    try:
        _agree(ranks, name, problem)
    except TransportError:
        transport.abort("the trial exchange failed")
        transport.close()
        raise
    extension.ops.engine_deadline(transport.engine, options.deadline)
    return transport


def _agree(ranks: Ranks, name: str, problem: str | None) -> None:
    for rank, theirs in enumerate(ranks.all_gather_object(problem)):
        if theirs:
            raise TransportError(
                f"transport {name} cannot run here, rank {rank}: {theirs}; "
                "use FOLDCP_TRANSPORT=auto"
            )


def _attempt(ranks: Ranks, name: str, make: Callable[[], Any]) -> Any:
    made, problem = None, None
    try:
        made = make()
    except RuntimeError as error:
        problem = str(error).splitlines()[0]
    _agree(ranks, name, problem)
    return made


def _open_host(ranks: Ranks, ops: Any, options: Options) -> int:
    if not sys.platform.startswith("linux"):
        _agree(ranks, "host", "it needs Linux")
    machines = ranks.all_gather_object(machine())
    if any(m != machines[0] for m in machines):
        _agree(ranks, "host", "the ranks are not on one machine (or not in one container)")
    slot = max(4 << 10, min(256 << 10, _HOST_BYTES // (4 * ranks.size**2)))
    place = ranks.rank, ranks.size, slot

    def create(path: str) -> int:
        return int(ops.host_open(*place, path, options.deadline))

    # Rank 0 makes the segment and marks it, the others open it where its process shows its files.
    engine = _attempt(ranks, "host", lambda: create("") if ranks.is_root else -1)
    path, mark = "", secrets.token_bytes(_MARK)
    if ranks.is_root:
        number = ops.host_descriptor(engine)
        os.pwrite(number, mark, _MARK_AT)
        path = f"/proc/{os.getpid()}/fd/{number}"
    path, mark = ranks.broadcast_object((path, mark))

    def join() -> int:
        if _is_foreign(path, mark):
            raise RuntimeError(f"{path} is not the segment of rank 0 of this run and this machine")
        return create(path)

    try:
        joined = _attempt(ranks, "host", lambda: -1 if ranks.is_root else join())
    except TransportError:
        if ranks.is_root:
            ops.engine_close(engine)
        raise
    return int(engine if ranks.is_root else joined)


def _is_foreign(path: str, mark: bytes) -> bool:
    """True for a file that rank 0 of this run has not marked: another machine may have such."""
    if not _SEGMENT.fullmatch(path):
        return True
    try:
        found = os.stat(path)
        if found.st_uid != os.geteuid() or not stat.S_ISREG(found.st_mode):
            return True
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            return os.pread(file, _MARK, _MARK_AT) != mark
        finally:
            os.close(file)
    except OSError:
        return False  # opening it says why


def _open_nccl(ranks: Ranks, ops: Any, options: Options) -> int:
    library, cpu = options.nccl_library, ranks.device.type == "cpu"
    # Every rank loads the library: one that cannot is not waited for below. An identifier comes
    # with a thread that listens, so rank 0 alone makes one.
    version = _attempt(ranks, "nccl", lambda: ops.nccl_version(library))
    _agree(ranks, "nccl", None if cpu else _same_gpu(ranks, version))
    made = _attempt(ranks, "nccl", lambda: ops.nccl_unique_id(library) if ranks.is_root else "")
    identifier = ranks.broadcast_object(made)
    place = -1 if cpu else ranks.device.index or 0, ranks.rank, ranks.size
    more = identifier, options.max_ctas, options.deadline
    return int(_attempt(ranks, "nccl", lambda: ops.nccl_open(library, *place, *more)))


def _same_gpu(ranks: Ranks, version: int) -> str | None:
    """Says which ranks share a GPU where NCCL refuses that."""
    uuid = str(torch.cuda.get_device_properties(ranks.device).uuid)
    gpus = ranks.all_gather_object((machine()[0], uuid))
    for rank, gpu in enumerate(gpus):
        first = gpus.index(gpu)
        if first == rank or (version >= _SHARED_GPU and shares_gpus(os.environ)):
            continue
        return (
            f"ranks {first} and {rank} both use one GPU ({gpu[1]}), which NCCL "
            f"{described_version(version)} refuses: give every rank a GPU of its own "
            '(Mesh.create(rows, cols, "cuda") takes that of the local rank), or '
            "FOLDCP_TRANSPORT=copy-engine to try several ranks on one"
        )
    return None


def described_version(version: int) -> str:
    """Return NCCL's version number as people write it."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def _open_copies(ranks: Ranks, ops: Any, options: Options) -> int:
    machines = ranks.all_gather_object(machine())
    if any(m[0] != machines[0][0] for m in machines):
        _agree(ranks, "copy-engine", "the ranks are not on one machine: use nccl")
    slot = max(1 << 20, min(32 << 20, _WINDOW_BYTES // (2 * ranks.size)))
    place = ranks.device.index or 0, ranks.rank, ranks.size, slot
    window = _attempt(ranks, "copy-engine", lambda: ops.copy_window(*place))
    handle = _attempt(ranks, "copy-engine", lambda: ops.copy_handle(window))
    handles = ",".join(ranks.all_gather_object(handle))
    deadline = options.deadline
    return int(_attempt(ranks, "copy-engine", lambda: ops.copy_open(window, handles, deadline)))


def _try_out(ranks: Ranks, transport: EngineTransport) -> str | None:
    """Exchange known numbers with every rank, both ways; says what came out wrong.

    Peer-to-peer copies between GPUs are known to go wrong without an error, from a size on, where
    the machine's IOMMU or ACS is set up for virtual machines.
    """
    count = _TRIAL[transport.name] // 4
    peers = [p for p in range(ranks.size) if p != ranks.rank]
    numbers = torch.arange(count, dtype=torch.int32, device=ranks.device)
    flight, problem = transport.flight(), None
    for step, packed in enumerate((True, False, True)):

        def made(rank: int, step: int = step) -> torch.Tensor:
            # Odd factors: each 4 bytes differ from those around, of other ranks, and other steps.
            return numbers * (2 * (3 * rank + step) + 1) + rank

        mine = made(ranks.rank)
        shape = (len(peers), count // 4, 5) if packed else (len(peers), count)
        room = torch.full(shape, -1, dtype=torch.int32, device=ranks.device)
        seen = [x[:, :4] if packed else x for x in room]
        view = mine.view(4, count // 4).t() if packed else mine
        sends = [Message(p, (view,), (False,)) for p in peers]
        recvs = [Message(p, (x,), (False,)) for p, x in zip(peers, seen, strict=True)]
        size = staging_bytes([*sends, *recvs])
        staging = torch.empty(size, dtype=torch.uint8, device=ranks.device)
        flight.post(step % 2, sends, recvs, tag("trial", step), staging)
        flight.arrive(step % 2)
        for peer, x in zip(peers, seen, strict=True):
            want = made(peer)
            want = want.view(4, count // 4).t() if packed else want
            if problem is None and not torch.equal(x, want):
                bad = int((x != want).sum())
                problem = (
                    f"a trial exchange with rank {peer} brought wrong numbers ({bad} of {count})"
                )
    flight.land()  # all steps, whatever came: the others wait for this rank in them
    return problem and problem + _REMEDY.get(transport.name, "")
