"""Blocks of the trunk and of the confidence module, replayed from a recording of one of them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import is_dataclass
from typing import Any
from unittest import mock

import parity
import pytest
import torch
from boltz.model.layers.pairformer import PairformerModule as Stock
from syncs import Tape
from torch import Tensor

from bench.block import randomised
from foldcp.boltz.families.dry_run.device import fake_cuda
from foldcp.boltz.families.dry_run.features import features
from foldcp.boltz.families.dry_run.measure import few_chunks
from foldcp.boltz.families.dry_run.mesh import fake_mesh
from foldcp.boltz.families.dry_run.model import onto, shapes_of_model
from foldcp.boltz.families.swap import apply
from foldcp.fabric.mesh import Mesh
from foldcp.layout.tiles import PairLayout
from foldcp.modules.graphs import block_graph, step_graph
from foldcp.modules.graphs.weight_slots import WeightSlots, _named
from foldcp.modules.settings import Settings
from foldcp.modules.trunk import stack as trunk_stack
from foldcp.modules.trunk.msa import MSALayer
from foldcp.modules.trunk.pairformer import PairformerLayer, PairformerModule
from foldcp_kernels.core.dispatch import set_impl
from foldcp_kernels.core.weight_cache import derived

TOKENS, TEMPLATE_BLOCKS = 20, 1


def with_templates(feats: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The features of an input with templates of random geometry."""
    n, draw = feats["token_index"].shape[1], torch.Generator().manual_seed(3)
    frames = torch.linalg.qr(torch.randn((1, count, n, 3, 3), generator=draw))[0]
    points = {
        f"template_{k}": torch.randn((1, count, n, 3), generator=draw)
        for k in ("cb", "ca", "frame_t")
    }
    masks = {f"template_{k}": torch.ones(1, count, n) for k in ("mask", "mask_cb", "mask_frame")}
    kinds = {
        "template_restype": torch.ones((1, count, n), dtype=torch.long),
        "visibility_ids": torch.zeros((1, count, n)),
    }
    return feats | points | masks | kinds | {"template_frame_rot": frames}


class Steers:
    """Steers towards the origin, with two particles."""

    resample, guide, num_particles, resampling_interval, strength = True, True, 2, 1, 1.0

    def energy(self, coords: Tensor, time: float) -> Tensor:
        return coords.square().mean((1, 2))

    def guidance(self, coords: Tensor, time: float) -> Tensor:
        return -0.01 * coords


def predict(
    recorder: Any,
    settings: Settings,
    *inputs: dict[str, Tensor],
    steering: Any = None,
    **model: Any,
) -> list[dict[str, Any]]:
    """What a tiny Boltz-2 predicts for several inputs, and a number drawn at the end."""
    net = parity.build_model(**model, steering={"contact_guidance_update": False})
    mesh = Mesh.create(1, 1)
    apply(net, mesh)
    if steering is not None:
        net.predict_step.fold.steering = lambda feats, device: steering
    torch.manual_seed(5)

    def made(mesh: Mesh, steered: bool = False, unique: bool = True) -> Any:
        return None if steered else recorder

    with (
        mock.patch.object(step_graph, "recorder", made),
        mock.patch("foldcp.modules.diffusion.sampler.recorder", made),
    ):
        found = [net.predict_step.fold(dict(feats), settings) for feats in inputs]
    assert mesh.recordings is None
    return [*found, {"drawn": torch.rand(1)}]


def assert_equal(a: Any, b: Any) -> None:
    """Bit for bit, nested dictionaries included."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif is_dataclass(a):
        assert_equal(vars(a), vars(b))


# Both stages have blocks of a kind that is new to them, and the second input another number of
# tokens. Of each kind the first block runs as it is, the second on the recording's tensors.
INPUTS = (with_templates(features(TOKENS, 5), 2), features(13, 3))
DEPTHS = dict(pairformer_blocks=3, msa_blocks=2, confidence_blocks=2)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "foldcp.graph"]


def test_replayed_blocks_are_the_blocks() -> None:
    settings, tape = Settings(2, 3, 3), Tape()
    plain = predict(None, settings, *INPUTS, **DEPTHS)
    assert_equal(plain, predict(tape, settings, *INPUTS, **DEPTHS))
    # Templates, MSA, pairformer, the step and confidence of the first input; no templates next.
    assert tape.recorded == 5 + 4
    passes, samples, steps = 3, 3, 3
    blocks = passes * (2 * DEPTHS["msa_blocks"] + 2 * DEPTHS["pairformer_blocks"])
    templates = passes * 2 * TEMPLATE_BLOCKS
    rated = 2 * samples * DEPTHS["confidence_blocks"]
    unrecorded = 2 * (5 + 4)
    assert tape.replayed == blocks + templates + rated + 2 * steps - unrecorded
    assert tape.released == 2 * 3  # trunk, sampler and confidence give their memory back


def test_steered_samples_leave_the_trunk_recorded() -> None:
    def steered(recorder: Any) -> list[dict[str, Any]]:
        return predict(recorder, Settings(1, 3, 1), INPUTS[1], steering=Steers(), **DEPTHS)

    tape = Tape()
    assert_equal(steered(None), steered(tape))
    # Neither the step nor confidence, which has two blocks to run.
    assert tape.recorded == 2


def stack(
    recorder: Any, layers: int = 5, n: int = TOKENS, passes: int = 2, mesh: Mesh | None = None
) -> Tensor:
    """A pairformer stack on random tensors, twice, and a number drawn at the end."""
    net = Stock(32, 32, layers, num_heads=2, pairwise_head_width=16, pairwise_num_heads=2, v2=True)
    mesh = mesh or Mesh.create(1, 1)
    tiled, layout = PairformerModule(randomised(net), mesh), PairLayout(n, 1, 1, 0)
    torch.manual_seed(1)
    s, z = torch.randn(1, n, 32), torch.randn(1, n, n, 32)
    with (
        torch.no_grad(),
        mock.patch.object(step_graph, "recorder", lambda *_, **__: recorder),
        block_graph.recorded(mesh),
    ):
        for _ in range(passes):
            s, given = tiled(s, z, layout)[0], z
            assert given is z
    return torch.cat([s.flatten(), z.flatten(), torch.rand(1)])


def test_every_block_has_its_own_weights() -> None:
    plain, tape = stack(None), Tape()
    assert torch.equal(stack(tape), plain)
    assert (tape.recorded, tape.replayed) == (1, 2 * 5 - 2)
    inner = WeightSlots.load
    with mock.patch.object(WeightSlots, "load", lambda self, _: inner(self, self._module)):
        assert not torch.equal(stack(Tape()), plain), "the weights were not needed"


def test_so_has_what_the_kernels_keep_of_them() -> None:
    """In their own dtype, and stacked."""
    small = dict(layers=3, n=3, passes=1)
    set_impl("triton")
    try:
        plain, tape, inner = stack(None, **small), Tape(), WeightSlots._derive
        assert torch.equal(stack(tape, **small), plain)
        assert (tape.recorded, tape.replayed) == (1, 1)

        def stale(self: WeightSlots, at: Any, build: Any, named: dict) -> Tensor:
            return inner(self, at, build, _named(self._module))

        with mock.patch.object(WeightSlots, "_derive", stale):
            assert not torch.equal(stack(Tape(), **small), plain), "nothing was kept"
    finally:
        set_impl("auto")


def test_weights_changed_in_place_are_read_again() -> None:
    """Between two loads of one recording, what kernels keep of them included."""
    linear, slots = torch.nn.Linear(3, 2), None

    def run() -> Tensor:
        return derived("double", (linear.weight,), lambda w: 2 * w) + linear.weight

    for factor in (1, 3):
        with torch.no_grad():
            linear.weight.mul_(factor)
            want = run()
            slots = slots or WeightSlots(linear)
            slots.load(linear)
            with slots.standing_in():
                run()  # at first it makes the slot
            slots.load(linear)
            with slots.standing_in(), slots.complete():
                assert torch.equal(run(), want)


@pytest.mark.parametrize(
    ("plant", "why"),
    [
        (lambda z: bool(z.sum() > 0), "aten._local_scalar_dense"),
        (lambda z: torch.rand(1), "aten.rand.default draws random numbers"),
        (lambda z: z[z > 1e9], "aten.nonzero|aten.index"),
    ],
)
def test_a_wait_or_a_draw_in_a_block_is_seen_and_costs_nothing(
    plant: Callable[[Tensor], Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    inner = trunk_stack.update_pair

    def update(z: Tensor, *rest: Any) -> Tensor:
        plant(z)
        return inner(z, *rest)

    with mock.patch.object(trunk_stack, "update_pair", update), caplog.at_level(logging.WARNING):
        plain, tape, mesh = stack(None), Tape(), Mesh.create(1, 1)
        for _ in range(2):
            assert torch.equal(stack(tape, mesh=mesh), plain)
        assert tape.recorded == 0
        (line,) = said(caplog)
        assert re.search(f"blocks .* without a CUDA graph: ({why})", line), line
        mesh = Mesh.create(1, 1, graphs="1")
        with pytest.raises(RuntimeError, match=why):
            stack(tape, mesh=mesh)
    assert mesh.recordings is None


def test_where_memory_is_short_blocks_run_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    """Though there seemed to be room; what the recording was to take is given back at once."""
    held: list[int] = []
    mesh = Mesh.create(1, 1)

    class Short(Tape):
        def warm_up(self, call: Callable[[], Any]) -> Any:
            call()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    def done(blocks: int, total: int) -> None:
        held.append(sum(len(kind.state) for kind in mesh.recordings._kinds.values()))

    plain, inner, tape = stack(None), block_graph.run_blocks, Short()
    watched = lambda *args: inner(*args[:4], done)  # noqa: E731
    with (
        mock.patch("foldcp.modules.trunk.stack.run_blocks", watched),
        caplog.at_level(logging.WARNING),
    ):
        assert torch.equal(stack(tape, mesh=mesh), plain)
    assert tape.recorded == 0 and len(held) == 10 and not any(held)
    (line,) = said(caplog)
    assert "run without a CUDA graph: CUDA out of memory" in line


def test_a_host_number_that_changes_is_seen() -> None:
    inner, calls = PairformerLayer.compute, []

    def compute(self: PairformerLayer, s: Tensor, z: Tensor, *rest: Any) -> Any:
        calls.append(0)
        s, z = inner(self, s, z, *rest)
        return s + 1e-3 * len(calls), z

    with mock.patch.object(PairformerLayer, "compute", compute):
        plain = stack(None)
        calls.clear()
        assert not torch.equal(stack(Tape()), plain)


def test_blocks_are_recorded_where_the_host_is_what_takes_time() -> None:
    def recordings(graphs: str = "auto") -> int:
        tape = Tape()
        stack(tape, layers=3, mesh=Mesh.create(1, 1, graphs=graphs))
        return tape.recorded

    assert recordings() == 1
    with mock.patch.object(block_graph, "free_bytes", lambda mesh: 1000):
        assert recordings() == 0
    with mock.patch.object(block_graph, "MOST_OPERATIONS", 1000):
        assert recordings() == 0
        assert recordings("1") == 1
    model = shapes_of_model()
    block = model.pairformer_module.layers[0]
    pair = PairformerLayer(block, Mesh.create(1, 1))
    of_msa = MSALayer(model.msa_module.layers[0], Mesh.create(1, 1))

    def recorded(layer: Any, n: int, sequences: int = 0) -> bool:
        z = torch.empty((1, n, n, 128), device="meta")
        m = torch.empty((1, sequences, n, 64), device="meta")
        return layer.operations(z, m) <= block_graph.MOST_OPERATIONS

    assert recorded(pair, 1024) and not recorded(pair, 1100)
    assert recorded(of_msa, 1000, 1) and recorded(of_msa, 700, 1024)
    assert not recorded(of_msa, 900, 1024) and not recorded(of_msa, 512, 8192)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_block_takes_what_is_set_aside_for_it(kernels: str) -> None:
    n, found = 512, {}
    for kind in ("pair", "msa"):
        model = deepcopy(shapes_of_model())
        with fake_cuda() as device, few_chunks():
            onto(model, device)
            mesh, layout = fake_mesh(1, 1, device="cuda"), PairLayout(n, 1, 1, 0)
            z = torch.empty((1, n, n, 128), device="cuda")
            mask = torch.ones((1, n, n), device="cuda")
            if kind == "pair":
                layer = PairformerLayer(model.pairformer_module.layers[0], mesh)
                state, fixed = (torch.empty((1, n, 384), device="cuda"), z), (mask, None, None)
            else:
                layer = MSALayer(model.msa_module.layers[0], mesh)
                state = (z, torch.empty((1, 256, n, 64), device="cuda"))
                fixed = (mask, None, torch.ones((1, 256, n), device="cuda"))
            set_impl(kernels)
            try:
                before = device.live.now
                device.live.restart()
                layer.compute(*state, *fixed, layout)
            finally:
                set_impl("auto")
            found[kind] = (device.live.peak - before) / sum(x.nbytes for x in state)
    assert all(0.5 < part <= block_graph.TRANSIENT for part in found.values()), found
