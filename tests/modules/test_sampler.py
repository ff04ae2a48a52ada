"""The sampler does not wait for the device, can be recorded, and takes samples as memory allows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from copy import deepcopy
from typing import Any
from unittest import mock

import parity
import pytest
import ranks
import torch
import unlike
from syncs import Syncs, Tape
from test_diffusion import Case, _shard, make_case, stock_sampler
from torch import Tensor

from foldcp.boltz.families import boltz2_options
from foldcp.boltz.families.dry_run.device import fake_cuda
from foldcp.boltz.families.dry_run.features import features
from foldcp.boltz.families.dry_run.measure import few_chunks, taken_as_finite
from foldcp.boltz.families.dry_run.mesh import fake_mesh
from foldcp.boltz.families.dry_run.model import onto, shapes_of_model
from foldcp.boltz.families.swap import apply
from foldcp.fabric.mesh import Mesh
from foldcp.modules.diffusion import batch_size, superposition
from foldcp.modules.diffusion.sampler import AtomDiffusion, SamplingStep
from foldcp.modules.diffusion.score_model import DiffusionModule
from foldcp.modules.graphs import step_graph
from foldcp.modules.hooks import Hooks
from foldcp.modules.settings import Settings
from foldcp_kernels.core.dispatch import set_impl

TOKENS, STEPS = 20, 4
FEW, MANY = 8, 16  # samples, enough to take more than what is made before the first step


class Watch(Hooks):
    """Progress of a prediction: what would wait between the first and the last sampling step."""

    def __init__(self) -> None:
        self.syncs, self.steps = Syncs(), 0

    def at(self, stage: str, done: int, total: int) -> None:
        if stage == "diffusion":
            self.steps += 1
            if done == 1:
                self.syncs.__enter__()
            elif done == total:
                self.syncs.__exit__(None, None, None)


def watched(mesh: Mesh, least: int = 0) -> list[str]:
    """What waits in the sampling steps of a tiny Boltz-2; `least` replaces MIN_ATOMS."""
    model = parity.build_model(steering={"contact_guidance_update": False})
    apply(model, mesh)
    watch = Watch()
    with mock.patch.object(superposition, "MIN_ATOMS", least or superposition.MIN_ATOMS):
        model.predict_step.fold(features(TOKENS), Settings(0, STEPS, 2), watch)
    assert watch.steps == STEPS
    assert watch.syncs.operators > 100 * (STEPS - 1), "the operators were not seen"
    return watch.syncs.found


def watched_and_short(mesh: Mesh) -> tuple[list[str], list[list[int]], Any]:
    """All cases of a mesh in one start of its ranks."""
    return watched(mesh), short_of_memory(mesh), mesh.size > 1 and unlike.predicted(mesh)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (2, 2)])
def test_no_step_waits_and_all_ranks_decide_and_draw_alike(rows: int, cols: int) -> None:
    for rank, (found, sizes, drawn) in enumerate(
        ranks.run(rows, cols, watched_and_short, transport="host", fresh=True)
    ):
        assert found == [], f"rank {rank}"
        # At most 5 of 6; room for 4 on rank 0 and for 1 on the last of four; room for none.
        assert sizes == [[3, 3], [3, 3] if rows == 1 else [1] * 6, [1] * 6], f"rank {rank}"
        if drawn:
            unlike.check(rank, *drawn)


def test_the_watch_sees_a_decomposition_in_a_step() -> None:
    found = watched(Mesh.create(1, 1), least=10**9)
    assert found.count("_linalg_svd") == STEPS - 1


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0].item(),
        lambda x: bool(x[0] > 0),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.numpy(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: torch.tensor([1.0]) + x,
        lambda x: torch.linalg.inv(x.diag()),
        lambda x: torch.cuda.synchronize(),
        lambda x: list(range(x.argmax())),
    ],
)
def test_the_watch_sees_every_way_to_wait(wait: Callable[[Tensor], Any]) -> None:
    x = torch.arange(1.0, 4.0)
    with Syncs() as syncs:
        x * 2 + x.sum()
    assert syncs.found == []
    with syncs:
        wait(x)
    assert syncs.found


def shapes_of_few_layers() -> Any:
    """A new Boltz-2 in its real dimensions, without values, with 2 token layers."""
    model = deepcopy(shapes_of_model())
    for owner, name in (
        (model.structure_module.score_model.token_transformer, "layers"),
        (model.diffusion_conditioning, "token_trans_proj_z"),
    ):
        setattr(owner, name, getattr(owner, name)[:2])
    return model


@pytest.mark.parametrize(("rows", "rank"), [(1, 0), (2, 1)])
def test_no_step_waits_on_shapes_of_a_gpu(rows: int, rank: int) -> None:
    """There a step that depends on values cannot run at all."""

    def predict(plant: Callable[[Tensor], Any]) -> list[str]:
        model, real = shapes_of_few_layers(), features(TOKENS)
        watch, inner = Watch(), SamplingStep.__call__

        def step(self: SamplingStep, coords: Tensor, *rest: Any) -> Tensor:
            plant(coords)
            return inner(self, coords, *rest)

        planted = mock.patch.object(SamplingStep, "__call__", step)
        with fake_cuda() as device, planted, taken_as_finite():
            onto(model, device)
            apply(model, fake_mesh(rows, rows, rank, "cuda"))
            feats = {name: device.known(value) for name, value in real.items()}
            model.predict_step.fold(feats, Settings(0, 3, 2), watch)
        assert watch.steps == 3
        return watch.syncs.found

    assert predict(lambda x: None) == []
    if rows == 1:
        with pytest.raises(RuntimeError, match="not known"):
            predict(lambda x: bool(x[0, 0, 0] > 0))


def draw(mesh: Mesh, case: Case, recorder: Any = None, steps: int = 20, **options: Any) -> Tensor:
    """Samples of a case, and then one number of the generator, in one tensor."""
    shards = (_shard(case.trunk.s_inputs, case.layout), _shard(case.trunk.s, case.layout))
    torch.manual_seed(5)
    with mock.patch("foldcp.modules.diffusion.sampler.recorder", lambda *_: recorder):
        twin = stock_sampler().to(case.ours.q.dtype)
        coords = AtomDiffusion(twin, mesh, boltz2_options.sampler(twin)).sample(
            case.ours,
            *shards,
            case.feats,
            case.layout,
            case.atom_layout,
            num_sampling_steps=steps,
            **options,
        )
    return torch.cat([coords.flatten(), torch.rand(1, dtype=coords.dtype)])


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case(Mesh.create(1, 1), TOKENS, dtype=torch.float32)


def test_a_recorded_step_is_the_step(case: Case) -> None:
    mesh = Mesh.create(1, 1)
    options = dict(multiplicity=3, max_parallel_samples=2)
    plain, tape = draw(mesh, case, **options), Tape()
    assert torch.equal(draw(mesh, case, tape, **options), plain)
    assert (tape.recorded, tape.replayed, tape.released) == (1, 20 - step_graph.WARM_UP, 1)
    for _ in range(2):  # each input has its own recording
        assert torch.equal(draw(mesh, case, tape, steps=7, **options)[:-1].isfinite().all(), YES)
    assert tape.recorded == 3


YES = torch.tensor(True)


def test_a_host_number_in_a_step_would_be_seen(case: Case) -> None:
    inner, calls = SamplingStep.__call__, []

    def step(self: SamplingStep, coords: Tensor, *rest: Any) -> Tensor:
        calls.append(0)
        return inner(self, coords, *rest) + 1e-3 * len(calls)

    mesh = Mesh.create(1, 1)
    with mock.patch.object(SamplingStep, "__call__", step):
        plain = draw(mesh, case)
        calls.clear()
        assert not torch.equal(draw(mesh, case, Tape()), plain)


def test_steps_that_cannot_be_recorded_run_one_by_one(
    case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    inner = SamplingStep.__call__

    def step(self: SamplingStep, coords: Tensor, *rest: Any) -> Tensor:
        assert bool(coords.isfinite().all())
        return inner(self, coords, *rest)

    mesh, tape = Mesh.create(1, 1), Tape()
    plain = draw(mesh, case)
    with mock.patch.object(SamplingStep, "__call__", step), caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(draw(mesh, case, tape), plain)
        said = [r.getMessage() for r in caplog.records if r.name == "foldcp.graph"]
        assert len(said) == 1 and "without a CUDA graph: aten._local_scalar" in said[0], said
        with pytest.raises(RuntimeError, match="cannot be recorded"):
            draw(mesh.with_policy(graphs="1"), case, tape)
    assert tape.replayed == 0


def test_when_steps_are_recorded() -> None:
    gpu = fake_mesh(1, 1, device="cuda")
    several = fake_mesh(2, 2, device="cuda")
    with mock.patch.object(torch.cuda, "is_available", lambda: True):
        assert step_graph.recorder(gpu, steered=False, unique=True) is not None
        for mode, answer in (("auto", None), ("1", ValueError)):
            for mesh, steered, unique, why in (
                (gpu, True, True, "potentials steer"),
                (gpu, False, False, "fewer than three atoms"),
                (several, False, True, "ranks exchange"),
                (Mesh.create(1, 1), False, True, "the run is on cpu"),
            ):
                mesh = mesh.with_policy(graphs=mode)
                if answer is None:
                    assert step_graph.recorder(mesh, steered, unique) is None
                    continue
                with pytest.raises(answer, match=f"FOLDCP_GRAPHS=1 .*{why}"):
                    step_graph.recorder(mesh, steered, unique)
        never = gpu.with_policy(graphs="0")
        assert step_graph.recorder(never, steered=False, unique=True) is None
    with pytest.raises(ValueError, match="graphs must be one of .*'on'"):
        gpu.with_policy(graphs="on")


class Calls:
    """Counts the samples of each call of the score model."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._inner = DiffusionModule.forward

    def __enter__(self) -> Calls:
        calls, inner = self.sizes, self._inner

        def forward(module: DiffusionModule, prepared: Any, r_noisy: Tensor, s: Tensor) -> Tensor:
            calls.append(len(r_noisy))
            return inner(module, prepared, r_noisy, s)

        self._patch = mock.patch.object(DiffusionModule, "forward", forward)
        self._patch.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._patch.__exit__(*error)


@pytest.mark.parametrize(
    ("at_most", "sizes"),
    [(5, [5, 5]), (4, [4, 4, 2]), (3, [3, 3, 3, 1]), (1, [1] * 10), (50, [10]), (None, [10])],
)
def test_ten_samples_a_few_at_a_time(case: Case, at_most: int | None, sizes: list[int]) -> None:
    mesh = Mesh.create(1, 1)
    whole = draw(mesh, case, multiplicity=10, steps=3)
    with Calls() as calls:
        parts = draw(mesh, case, multiplicity=10, steps=3, max_parallel_samples=at_most)
    assert calls.sizes == 3 * sizes
    scale = float(whole.abs().max())
    assert float((parts - whole).abs().max()) <= 1e-5 * scale
    assert parts[-1] == whole[-1], "the generators differ"


def short_of_memory(mesh: Mesh) -> list[list[int]]:
    """Sizes of the calls of one step when this rank has room for so many samples."""
    found = []
    case = make_case(mesh, TOKENS, dtype=torch.float32)
    for room in (100, 4 - mesh.rank, 0):
        each = []

        def free(mesh: Mesh, room: int = room, each: list = each) -> int:
            return int(room * each[0] / batch_size._SHARE) + 1

        def measured(*args: Any, each: list = each, inner: Any = batch_size.sample_bytes) -> int:
            each.append(inner(*args))
            return each[-1]

        with (
            mock.patch.object(batch_size, "free_bytes", free),
            mock.patch("foldcp.modules.diffusion.sampler.sample_bytes", measured),
            Calls() as calls,
        ):
            draw(mesh, case, steps=2, multiplicity=6, max_parallel_samples=5)
        found.append(calls.sizes[: len(calls.sizes) // 2])
    return found


def measured_and_estimated(tokens: int, rows: int, kernels: str) -> tuple[float, int]:
    """Bytes that one more sample adds to the peak of sampling on a GPU, and the estimate."""
    model, real = shapes_of_few_layers(), features(tokens)
    peaks: list[int] = []
    with fake_cuda() as device, few_chunks(), taken_as_finite():
        onto(model, device)
        apply(model, fake_mesh(rows, rows, rows - 1, "cuda"))
        feats = {name: device.known(value) for name, value in real.items()}
        inner, found = model.structure_module.sample, []

        def sample(**options: Any) -> Tensor:
            for count in FEW, MANY:
                device.live.restart()
                inner(**options | {"multiplicity": count})
                peaks.append(device.live.peak)
            return inner(**options)

        def estimate(*args: Any, inner: Any = batch_size.sample_bytes) -> int:
            found.append(inner(*args))
            return found[-1]

        set_impl(kernels)
        try:
            with (
                mock.patch.object(model.structure_module, "sample", sample),
                mock.patch("foldcp.modules.diffusion.sampler.sample_bytes", estimate),
            ):
                model.predict_step.fold(feats, Settings(0, 2, 1))
        finally:
            set_impl("auto")
        return (peaks[1] - peaks[0]) / (MANY - FEW), found[0]


@pytest.mark.parametrize(("rows", "kernels"), [(1, "torch"), (2, "triton")])
def test_the_estimate_of_a_sample_bounds_what_one_takes(rows: int, kernels: str) -> None:
    measured, estimated = measured_and_estimated(128, rows, kernels)
    assert measured <= estimated <= 2 * measured
