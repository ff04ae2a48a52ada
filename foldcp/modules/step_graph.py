"""A sampling step recorded once as a CUDA graph and replayed: the host launches no kernels then.

What a step reads that changes between steps are its arguments. They are copied into fixed buffers
before each replay; everything else that the step touches stays where it was when it was recorded.
Random numbers are drawn outside, by the same calls as without a graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from foldcp.config import GRAPHS
from foldcp.mesh import Mesh

LOG = logging.getLogger("foldcp.graph")
WARM_UP = 2  # steps before recording: kernels are compiled, weights are cast, handles are made

_mode = ["auto"]
_said: set[str] = set()


class Recorder(Protocol):
    """Records a call once, and runs it again."""

    def record(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """(what replays the call, the tensor that every replay writes its result to)."""

    def release(self) -> None:
        """Give back the memory of recordings that are no longer used."""


class CudaRecorder:
    """Records as a CUDA graph.

    Args:
        device: of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def record(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """See `Recorder`."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            # Other threads may use CUDA meanwhile: the loader of the next input does.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                out = call()
        finally:
            torch.cuda.set_stream(stream)  # torch leaves its own stream set after a failure
        return graph.replay, out

    def release(self) -> None:
        """See `Recorder`."""
        torch.cuda.empty_cache()


def set_graphs(mode: str) -> None:
    """Set whether steps are recorded (FOLDCP_GRAPHS).

    Args:
        mode: "auto" where it is possible, "0" never, "1" always, or else an error.

    Raises:
        ValueError: another mode.
    """
    if mode not in GRAPHS:
        raise ValueError(f"`mode` must be one of {GRAPHS}, got {mode!r}")
    _mode[0] = mode


def recorder(mesh: Mesh, steered: bool, unique: bool) -> Recorder | None:
    """What records the steps of one input, None where they run one by one.

    Args:
        mesh: the mesh. steered: potentials move the samples. unique: see `Alignment.unique`.

    Raises:
        ValueError: FOLDCP_GRAPHS=1, but the steps cannot be recorded.
    """
    if _mode[0] == "0":
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
    if _mode[0] == "1":
        raise ValueError(
            f"FOLDCP_GRAPHS=1 asks for a CUDA graph, but {why}: use FOLDCP_GRAPHS=auto"
        )
    return None


class Steps:
    """Runs a step: as it is at first, then from its recording.

    Args:
        body: the step. All that changes between steps are its arguments, tensors of fixed shapes.
        recorder: None runs every step as it is.
    """

    def __init__(self, body: Callable[..., Tensor], recorder: Recorder | None) -> None:
        self._body, self._recorder = body, recorder
        self._done = 0
        self._buffers: tuple[Tensor, ...] = ()
        self._replay: Callable[[], None] | None = None
        self._out: Tensor | None = None

    @property
    def recorded(self) -> bool:
        """Whether steps are replayed."""
        return self._replay is not None

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
        if self._replay is None:
            return self._body(*arguments)
        for buffer, x in zip(self._buffers, arguments, strict=True):
            buffer.copy_(x)
        self._replay()
        assert self._out is not None
        return self._out

    def finish(self, result: Tensor) -> Tensor:
        """Drop the recording and return a result that outlives it."""
        if self._replay is not None:
            result = result.clone()
            self._replay, self._out, self._buffers = None, None, ()
            assert self._recorder is not None
            self._recorder.release()
        return result

    def _record(self, recorder: Recorder, arguments: tuple[Tensor, ...]) -> None:
        buffers = tuple(x.clone() for x in arguments)
        try:
            self._replay, self._out = recorder.record(lambda: self._body(*buffers))
            self._buffers = buffers
        except RuntimeError as error:
            self._recorder = None
            if _mode[0] == "1":
                raise
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            if first not in _said:
                _said.add(first)
                LOG.warning("sampling steps run without a CUDA graph: %s", first)
