"""A capture that is cut short, on a stand-in of what torch 2.11 leaves behind; unlike GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from syncs import Tape
from test_diffusion import Case, make_case
from test_sampler import TOKENS, draw
from torch import Tensor

from foldcp.errors import InputLost
from foldcp.fabric.mesh import Mesh
from foldcp.modules.diffusion.sampler import SamplingStep
from foldcp.modules.graphs import lasting
from foldcp.modules.graphs.step_graph import CudaRecorder
from foldcp.planner import agreement
from foldcp.runtime import recovery

CPU = torch.device("cpu", 0)
RAND, RANDN, GENERATOR = torch.rand, torch.randn, torch.Generator
OVER = "Offset increment outside graph capture encountered unexpectedly."
INVALID = "CUDA error: operation failed due to a previous error during capture"


class Generator:
    """A generator of torch 2.11: its state knows whether a capture is under way.

    The CPU's generator stands for the numbers; the state only says whether they may be drawn.
    """

    def __init__(self, *_: Any) -> None:
        self.state = SimpleNamespace(capturing=False)

    def get_state(self) -> Tensor:
        return torch.get_rng_state()

    def set_state(self, state: Tensor) -> None:
        torch.set_rng_state(state)

    def graphsafe_get_state(self) -> Generator:
        return self

    def graphsafe_set_state(self, other: Generator) -> None:
        self.state = other.state


class Torch211:
    """torch.cuda as far as a recorder uses it; capturing neither runs nor records anything.

    Args:
        stuck: a new state of the generator does not help either.
    """

    def __init__(self, stuck: bool = False) -> None:
        self.default, self.stuck = Generator(), stuck
        self.underway: list[int] = []
        self.released: list[int] = []
        self.pools, self.stream, self.valid = 0, "main", True

    def check(self) -> None:
        """What a draw outside of a capture does first."""
        if self.default.state.capturing or (self.stuck and not self.valid):
            raise RuntimeError(OVER)

    def wait(self) -> None:
        """What a wait for the device does to a capture."""
        if self.underway:
            self.valid = False
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    @contextmanager
    def graph(self, graph: Any, pool: int, stream: str, capture_error_mode: str) -> Iterator[None]:
        """torch.cuda.graph: what it has changed stays changed where the capture is not valid."""
        assert capture_error_mode == "thread_local" and pool not in self.released
        self.stream, self.default.state.capturing, self.valid = stream, True, True
        self.underway.append(pool)
        try:
            yield
        finally:
            if not self.valid:
                raise RuntimeError(INVALID)
            self.end(0, pool)
            self.stream, self.default.state.capturing = "main", False

    def end(self, device: int, pool: int) -> None:
        """torch._C._cuda_endAllocateToPool."""
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    def pool(self) -> int:
        """torch.cuda.graph_pool_handle."""
        self.pools += 1
        return self.pools

    @contextmanager
    def in_place(self) -> Iterator[Torch211]:
        """Put this in the place of torch.cuda."""

        def drawing(inner: Any) -> Any:
            def outer(*args: Any, **kwargs: Any) -> Tensor:
                self.check()
                return inner(*args, **kwargs)

            return outer

        def set_stream(stream: str) -> None:
            self.stream = stream

        graph = SimpleNamespace(replay=lambda: None)
        side = SimpleNamespace(wait_stream=lambda _: None)
        main = SimpleNamespace(wait_stream=lambda _: None)
        names: dict[str, Any] = {
            "cuda.graph": self.graph, "cuda.CUDAGraph": lambda: graph,
            "cuda.current_stream": lambda _: main,
            "cuda.graph_pool_handle": self.pool, "cuda.set_stream": set_stream,
            "cuda.stream": lambda _: nullcontext(),
            "cuda.default_generators": (self.default,), "cuda.empty_cache": lambda: None,
            "Generator": lambda *at: Generator() if at else GENERATOR(),
            "_C._cuda_endAllocateToPool": self.end,
            "_C._cuda_releasePool": lambda _, pool: self.released.append(pool),
            "rand": drawing(RAND), "randn": drawing(RANDN),
        }  # fmt: skip
        self.main = main
        with ExitStack() as stack:
            for name, value in names.items():
                stack.enter_context(mock.patch(f"torch.{name}", value, create=True))
            stack.enter_context(mock.patch.object(lasting, "stream", lambda device: side))
            stack.enter_context(mock.patch.object(lasting, "_cut_short", []))
            yield self


def test_draws_go_on_after_a_capture_that_was_cut_short() -> None:
    with Torch211().in_place() as fake:
        recorder = CudaRecorder(CPU)
        torch.manual_seed(1)
        expected = RANDN(3)
        torch.manual_seed(1)
        for pools in (1, 2):
            with pytest.raises(RuntimeError, match="previous error during capture"):
                recorder.record(fake.wait)
            assert fake.underway == [] and fake.released == list(range(1, pools + 1))
            assert fake.stream is fake.main and lasting.cut_short() == pools
        assert torch.equal(torch.randn(3), expected), "the generator moved"
        recorder.record(lambda: torch.ones(1))
        recorder.record(lambda: torch.ones(1))
        assert fake.pools == 3, "recordings do not share their memory"
        # What raises for reasons of its own leaves a capture that ends well.
        with pytest.raises(ZeroDivisionError):
            recorder.record(lambda: 1 // 0)
        assert lasting.cut_short() == 2
        torch.randn(3)


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case(Mesh.create(1, 1), TOKENS, dtype=torch.float32)


def test_the_sampler_goes_on_after_a_capture_that_was_cut_short(
    case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    inner, mesh = SamplingStep.__call__, Mesh.create(1, 1)
    plain = draw(mesh, case)
    with Torch211().in_place() as fake:

        def step(self: SamplingStep, *args: Any) -> Tensor:
            fake.wait()
            return inner(self, *args)

        with mock.patch.object(SamplingStep, "__call__", step):
            assert torch.equal(draw(mesh, case, CudaRecorder(CPU)), plain)
        assert fake.pools == 1, "nothing was captured"
    (line,) = [r.getMessage() for r in caplog.records if r.name == "foldcp.graph"]
    assert "without a CUDA graph: CUDA error: operation not permitted" in line


def test_a_step_that_fails_gives_its_recording_back(case: Case) -> None:
    tape = Tape()

    def fail(done: int, total: int) -> None:
        if done == 5:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        draw(Mesh.create(1, 1), case, tape, progress=fail)
    assert (tape.recorded, tape.released) == (1, 1)


def test_an_input_is_lost_where_no_numbers_can_be_drawn_any_more() -> None:
    run, one = SimpleNamespace(shared=False, failed={}), SimpleNamespace(name="one", tokens=5)
    with Torch211(stuck=True).in_place() as fake:
        recorder = CudaRecorder(CPU)
        with pytest.raises(InputLost, match="no random numbers .* FOLDCP_GRAPHS=0"):
            recorder.record(fake.wait)
        fake.valid = True
        assert recovery.together(run, one, lambda: recorder.record(fake.wait)) is None
    assert "FOLDCP_GRAPHS=0" in run.failed["one"]


def test_kinds_differ_by_what_a_draw_depends_on() -> None:
    def kind(name: str, processors: int) -> str:
        props = SimpleNamespace(
            name=name, multi_processor_count=processors, max_threads_per_multi_processor=2048
        )
        with (
            mock.patch.object(torch.cuda, "is_available", lambda: True),
            mock.patch.object(torch.cuda, "get_device_properties", lambda _: props),
        ):
            return agreement.kind(torch.device("cuda", 0))

    kinds = {kind("H100", 132), kind("H100", 114), kind("H200", 132)}
    with mock.patch.object(torch, "__version__", "2.11.0"):
        kinds.add(kind("H100", 132))
    assert len(kinds) == 4
    assert agreement.kind(torch.device("cpu")) == agreement.kind(torch.device("cpu"))
