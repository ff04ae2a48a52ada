"""A sampling step recorded once as a CUDA graph and replayed: the host launches no kernels then.

What a step reads that changes between steps are its arguments. They are copied into fixed buffers
before each replay; everything else that the step touches stays where it was when it was recorded.
Random numbers are drawn outside, by the same calls as without a graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from foldcp.errors import InputLost
from foldcp.fabric.mesh import Mesh
from foldcp.modules.graphs import lasting

LOG = logging.getLogger("foldcp.graph")
WARM_UP = 2  # steps before recording: kernels are compiled, weights are cast, handles are made


class Recorder(Protocol):
    """Records a call once, and runs it again."""

    def warm_up(self, call: Callable[[], Any]) -> Any:
        """Run a call as it is, where it will be recorded; returns its result."""

    def record(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Record a call: (its replay, its result, whose tensors every replay writes to).

        The call's work is done by replays only.
        """

    def release(self) -> None:
        """Give back the memory of recordings that are no longer used."""


class CudaRecorder:
    """Records as CUDA graphs, which share one pool of memory: replays never overlap.

    Args:
        device: of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, None

    def warm_up(self, call: Callable[[], Any]) -> Any:
        """See `Recorder`.

        On the stream of recordings, for which cuBLAS makes a workspace: made while recording, it
        would hold on to the recording's memory.
        """
        before, stream = torch.cuda.current_stream(self._device), lasting.stream(self._device)
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            out = call()
        before.wait_stream(stream)
        return out

    def record(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """See `Recorder`."""
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # Other threads may use CUDA meanwhile: the loader of the next input does.
        options = dict(stream=lasting.stream(self._device), capture_error_mode="thread_local")
        try:
            with torch.cuda.graph(graph, pool=self._pool, **options):
                out = call()
        except BaseException:
            torch.cuda.set_stream(before)  # torch leaves its own stream set after a failure
            pool, self._pool = self._pool, None
            recover(graph, pool, self._device)
            raise
        return graph.replay, out

    def release(self) -> None:
        """See `Recorder`."""
        self._pool = None
        torch.cuda.empty_cache()


def recover(graph: Any, pool: Any, device: torch.device) -> None:
    """Undo what torch leaves behind when a capture is cut short.

    `capture_end` raises before it has announced that the capture is over. The allocator goes on
    as if it were in progress and frees tensors of several streams no more. In torch 2.11
    the default generator does so too, and the next draw fails; it has no other way out than the end
    of a capture, or a new state with the same numbers, which needs no capture to succeed.

    Args:
        graph: what was captured.
        pool: its memory.
        device: of the capture.

    Raises:
        InputLost: no random numbers can be drawn.
    """
    index = device.index if device.index is not None else torch.cuda.current_device()
    with suppress(RuntimeError):  # the capture was ended, only what was captured failed
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)
        lasting.keep(graph)
    try:
        generator, fresh = torch.cuda.default_generators[index], torch.Generator(device)
        state = generator.get_state()
        fresh.set_state(state)
        generator.graphsafe_set_state(fresh.graphsafe_get_state())
        torch.rand(1, device=device)
        generator.set_state(state)
    except RuntimeError as error:
        raise InputLost(
            f"recording a CUDA graph failed, and afterwards no random numbers could be drawn "
            f"({_first_line(error)}): run it again with FOLDCP_GRAPHS=0"
        ) from error


def demanded(mesh: Mesh) -> bool:
    """Tell whether a failure to record is an error."""
    return mesh.policy.graphs == "1"


def recorder(mesh: Mesh, steered: bool = False, unique: bool = True) -> Recorder | None:
    """Return the recorder of one input's steps, or blocks; None where they run one by one.

    Args:
        mesh: the mesh.
        steered: potentials move the samples.
        unique: see `Superposition.unique`.

    Raises:
        ValueError: FOLDCP_GRAPHS=1, but nothing can be recorded.
    """
    if mesh.policy.graphs == "0":
        return None
    if mesh.device.type != "cuda":
        why = f"the run is on {mesh.device.type}"
    elif not torch.cuda.is_available():
        why = "there is no GPU"
    elif mesh.size > 1:
        why = "ranks exchange tiles in a step"
    elif steered:
        why = "potentials steer the samples"
    elif not unique:
        why = "the input has fewer than three atoms"
    else:
        return CudaRecorder(mesh.device)
    if demanded(mesh):
        raise ValueError(
            f"FOLDCP_GRAPHS=1 asks for a CUDA graph, but {why}: use FOLDCP_GRAPHS=auto"
        )
    return None


def goes_without(mesh: Mesh, what: str, error: RuntimeError) -> None:
    """Say once why something is not recorded.

    Args:
        mesh: of the run.
        what: it is.
        error: that recording met.

    Raises:
        RuntimeError: `error`, with FOLDCP_GRAPHS=1.
    """
    if demanded(mesh):
        raise error
    cause: BaseException = error  # the end of a capture only says that something failed before
    while isinstance(cause.__context__, RuntimeError):
        cause = cause.__context__
    first = _first_line(cause)
    if mesh.is_new(first):
        LOG.warning("%s run without a CUDA graph: %s", what, first)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Steps:
    """Runs a step: as it is at first, then from its recording. A context manager that drops it.

    Args:
        mesh: of the run.
        body: the step. All that changes between steps are its arguments, tensors of fixed shapes.
        recorder: None runs every step as it is.
    """

    def __init__(self, mesh: Mesh, body: Callable[..., Tensor], recorder: Recorder | None) -> None:
        self._mesh, self._body, self._recorder = mesh, body, recorder
        self._done = 0
        self._buffers: tuple[Tensor, ...] = ()
        self._replay: Callable[[], None] | None = None
        self._out: Tensor | None = None

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._replay is not None:
            self._replay, self._out, self._buffers = None, None, ()
            assert self._recorder is not None
            self._recorder.release()

    def __call__(self, *arguments: Tensor) -> Tensor:
        """One step.

        Args:
            arguments: of the body.

        Returns:
            Its result, valid until the next call.
        """
        if self._recorder is not None and self._replay is None and self._done == WARM_UP:
            self._record(self._recorder, arguments)
        self._done += 1
        if self._recorder is None:
            return self._body(*arguments)
        if self._replay is None:
            return self._recorder.warm_up(lambda: self._body(*arguments))
        for buffer, x in zip(self._buffers, arguments, strict=True):
            buffer.copy_(x)
        self._replay()
        assert self._out is not None
        return self._out

    def finish(self, result: Tensor) -> Tensor:
        """Copy a result so that it outlives the recording."""
        return result if self._replay is None else result.clone()

    def _record(self, recorder: Recorder, arguments: tuple[Tensor, ...]) -> None:
        buffers = tuple(x.clone() for x in arguments)
        try:
            self._replay, self._out = recorder.record(lambda: self._body(*buffers))
            self._buffers = buffers
        except RuntimeError as error:
            self._recorder = None
            goes_without(self._mesh, "sampling steps", error)
