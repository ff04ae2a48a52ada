"""Boltz-1 on meshes against stock Boltz-1 with the same seed, in float64, and its features."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any
from unittest import mock

import boltz1
import parity
import pytest
import torch
from pytorch_lightning import seed_everything
from ranks import run
from syncs import Syncs, Tape
from torch import Tensor, nn
from torch.nn.functional import one_hot

import foldcp
from foldcp.boltz.families import swap
from foldcp.boltz.families.predict_step import PredictStep
from foldcp.boltz.features import boltz1 as boltz1_features
from foldcp.fabric.mesh import Mesh
from foldcp.modules.hooks import Folded, Hooks, Sizes
from foldcp.modules.settings import Settings

FLOAT64 = 1e-9  # relative to the largest value of each output
RUN = dict(steps=12, samples=2, recycling=1)
POTENTIALS = dict(fk_steering=True, physical_guidance_update=True)
# (input, the confidence module has a trunk of its own, potentials)
CASES = [(name, True, False) for name in ("multimer", "ligand", "nucleic", "modified")]
CASES += [("multimer", False, False), ("ligand", True, True)]
# What only training reads.
DROPPED = {
    "atom_resolved_mask", "coords", "disto_center", "disto_target", "frame_resolved_mask",
    "r_set_to_rep_atom", "token_bonds", "token_disto_mask", "token_resolved_mask",
}  # fmt: skip
CLASSES = {"res_type": 33, "pocket_feature": 4, "msa": 33}
ATOM_CLASSES = {"ref_element": 128, "ref_atom_name_chars": 64}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(boltz1.process(tmp_path_factory.mktemp("boltz1")))


def dense(feats: dict[str, Any], key: str) -> Tensor:
    """A compact feature as stock has it."""
    value, real = feats[key], feats["atom_pad_mask"].long()
    if key in CLASSES:
        return one_hot(value.long(), CLASSES[key])
    if key in ATOM_CLASSES:
        found = one_hot(value, ATOM_CLASSES[key])
        return found * real.reshape(*real.shape, *[1] * (found.ndim - 2))
    n, atoms = feats["token_index"].shape[1], real.shape[1]
    if key == "atom_to_token":
        return one_hot(value, n) * real[..., None]
    return one_hot(value, atoms) if key == "token_to_rep_atom" else value


@pytest.mark.parametrize("name", ["multimer", "ligand", "nucleic", "modified"])
def test_compact_features_are_stocks(folder: str, name: str) -> None:
    stock = boltz1.features(folder, name, compact=False)
    state = torch.get_rng_state()
    feats = boltz1.features(folder, name, compact=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert stock.keys() - feats.keys() == DROPPED
    assert feats.keys() - stock.keys() == {"token_bond_index"}
    n, atoms = stock["token_index"].shape[1], stock["atom_pad_mask"].shape[1]
    for key in stock.keys() & feats.keys() - {"record"}:
        got, want = dense(feats, key), stock[key]
        assert got.shape == want.shape and torch.equal(got.double(), want.double()), key
        assert not {(n, n), (atoms, n), (n, atoms)} & set(
            zip(feats[key].shape, feats[key].shape[1:], strict=False)
        ), f"{key} is dense: {tuple(feats[key].shape)}"
    bonds = torch.zeros(n, n)
    bonds[feats["token_bond_index"][0].unbind(-1)] = 1
    assert torch.equal(bonds, stock["token_bonds"][0, :, :, 0])


def test_inputs_use_every_feature(folder: str) -> None:
    # Otherwise the comparisons above and below could hold without anything behind them.
    got = {name: boltz1.features(folder, name, compact=True) for name, _, _ in CASES}
    assert len(got["ligand"]["pocket_feature"].unique()) == 3
    assert got["modified"]["token_bond_index"].shape[1] > 6
    assert got["modified"]["connected_atom_index"].shape[-1] == 1
    assert got["modified"]["cyclic_period"].unique().tolist() == [0, 12]
    assert got["ligand"]["has_deletion"].any() and got["multimer"]["msa_paired"].any()
    assert got["ligand"]["rdkit_bounds_index"].shape[-1] > 0


def test_only_inference_features(folder: str) -> None:
    with pytest.raises(ValueError, match="`training` is True"):
        boltz1_features.CompactFeaturizer().process(None, training=True)
    with pytest.raises(TypeError, match="BoltzFeaturizer"):
        boltz1_features.CompactFeaturizer.install(object())


def predict(mesh: Mesh, folder: str, name: str, imitate: bool, potentials: bool) -> dict[str, Any]:
    """One prediction of a swapped model; results as the writer gets them (root rank only)."""
    model = build(imitate, potentials)
    foldcp.apply(model, mesh)
    model.predict_step.write_embeddings = True
    feats = boltz1.features(folder, name, compact=True)
    return parity.stock_outputs(model, feats, **RUN)


def build(imitate: bool, potentials: bool, **options: Any) -> torch.nn.Module:
    steering = POTENTIALS if potentials else None
    return boltz1.build_model(imitate, steering=steering, **options)


def cases(mesh: Mesh, folder: str, wanted: list[tuple[str, bool, bool]]) -> dict:
    return {case: predict(mesh, folder, *case) for case in wanted}


@lru_cache
def stock(folder: str, name: str, imitate: bool, potentials: bool) -> dict[str, Any]:
    feats = boltz1.features(folder, name, compact=False)
    return parity.stock_outputs(build(imitate, potentials), feats, **RUN)


def compare(got: dict[str, Any], want: dict[str, Any], case: tuple) -> None:
    away = parity.largest_differences(got, want)
    scale = parity.largest_differences(want, zeros(want))
    for key, error in away.items():
        assert error <= FLOAT64 * max(1.0, scale[key]), f"{case} {key}: {error:.2e}"


def zeros(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: zeros(v) for k, v in value.items()}
    return torch.zeros_like(value) if isinstance(value, Tensor) else 0


@pytest.mark.parametrize("rows,cols", [(1, 1), (2, 2), (1, 3)])
def test_same_seed_same_structure(folder: str, rows: int, cols: int) -> None:
    # The last one is everything at once: ligands, pocket, potentials, a confidence trunk.
    wanted = {1: CASES, 4: CASES[3:], 3: CASES[2:3]}[rows * cols]
    root = run(rows, cols, cases, folder, wanted)[0]
    for case, got in root.items():
        compare(got, stock(folder, *case), case)


class Rows:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, int], list[Tensor]] = {}

    def rows(self, name: str, sample: int, lo: int, block: Tensor) -> None:
        assert lo == sum(len(x) for x in self.kept.get((name, sample), []))
        self.kept.setdefault((name, sample), []).append(block.clone())

    def whole(self, name: str, samples: int) -> Tensor:
        return torch.stack([torch.cat(self.kept[name, m]) for m in range(samples)])


class Streams(Hooks):
    """Send the matrices to a sink, and hand the rest out."""

    def __init__(self, step: PredictStep, sink: Rows, batch: Any) -> None:
        self.step, self.sink = step, sink

    def open_outputs(self, sizes: Sizes) -> Rows:
        return self.sink

    def hand_over(self, folded: Folded) -> dict[str, Any]:
        assert folded.sink is self.sink
        return self.step.prediction(folded)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"write_full_pae": False, "write_full_pde": True},
        {"write_confidence_summary": False, "write_full_pae": True},
    ],
)
def test_prediction_holds_what_stocks_does(folder: str, flags: dict[str, bool]) -> None:
    args = dict(recycling_steps=0, sampling_steps=4, diffusion_samples=2, **flags)
    args["max_parallel_samples"] = 1
    model, ours, streams = (build(True, False, dtype=torch.float32) for _ in range(3))
    results = []
    for each in (model, ours, streams):
        if each is not model:
            swap.apply(each, Mesh.create(1, 1, "cpu"))
            each.predict_step.write_embeddings = True
        sink = Rows()
        if each is streams:
            each.predict_step.begin = partial(Streams, each.predict_step, sink)
        each.predict_args = args
        batch = boltz1.features(folder, "nucleic", compact=each is not model)
        seed_everything(1, verbose=False)
        with torch.no_grad():
            results.append(each.predict_step(batch, 0))
    want, got, streamed = results
    assert got.keys() == want.keys()
    matrices = {"pae", "pde"} & want.keys()
    assert {name for name, _ in sink.kept} == {"z"} | matrices
    assert streamed.keys() == want.keys() - matrices - {"z"}
    for name in matrices:
        assert torch.equal(sink.whole(name, 2), got[name]), name
    assert torch.equal(sink.whole("z", 1), got["z"])


class Watch(Hooks):
    """Progress of a prediction: what would wait between the first and the last sampling step."""

    def __init__(self) -> None:
        self.syncs = Syncs()

    def at(self, stage: str, done: int, total: int) -> None:
        if (stage, done) == ("diffusion", 1):
            self.syncs.__enter__()
        elif (stage, done) == ("diffusion", total):
            self.syncs.__exit__(None, None, None)


def test_steps_never_wait_and_can_be_recorded(folder: str) -> None:
    model, watch, tape = build(True, False, dtype=torch.float32), Watch(), Tape()
    swap.apply(model, Mesh.create(1, 1, "cpu"))
    feats, found = boltz1.features(folder, "nucleic", compact=True), []
    for recorder, hooks in ((None, watch), (tape, Hooks())):
        seed_everything(3, verbose=False)
        with mock.patch("foldcp.modules.diffusion.sampler.recorder", lambda *_, r=recorder: r):
            out = model.predict_step.fold(feats, Settings(0, 8, 2, max_parallel_samples=1), hooks)
        found.append((out.coords, out.ratings.plddt))
    assert watch.syncs.operators > 1000 and watch.syncs.found == []
    # pLDDT follows from the tokens of every step, which a replay must renew.
    assert tape.replayed > 0
    for got, want in zip(found[1], found[0], strict=True):
        assert torch.equal(got, want)


def test_swap_keeps_parameters_and_draws(folder: str) -> None:
    model = build(True, False, dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = swap.apply(model, Mesh.create(1, 1, "cpu"))
    assert "confidence_module" in report.swapped and "structure_module" in report.swapped
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    # A data-parallel group that steps over an input draws what folding it draws.
    parity.set_predict_args(model, steps=4, samples=2, recycling=1)
    feats, states = boltz1.features(folder, "nucleic", compact=True), []
    step = model.predict_step
    for fold in (lambda: step(feats, 0), lambda: step.replay(feats)):
        seed_everything(2, verbose=False)
        fold()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    with pytest.raises(ValueError, match="swapped before"):
        swap.apply(model, Mesh.create(1, 1, "cpu"))


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda m: m.train(), "training mode"),
        (lambda m: setattr(m, "alpha_pae", 0.0), "does not predict confidence"),
        (lambda m: setattr(m, "no_msa", True), "no MSA module"),
        (lambda m: setattr(m.input_embedder, "no_atom_encoder", True), "no atom encoder"),
    ],
)
def test_what_cannot_be_swapped(change: Any, message: str) -> None:
    model = build(True, False)
    change(model)
    with pytest.raises(ValueError, match=message):
        swap.apply(model, Mesh.create(1, 1, "cpu"))
    with pytest.raises(ValueError, match="fp32 for Boltz-1"):
        swap.apply(model, Mesh.create(1, 1, "cpu"), precision="bf16")


def test_a_model_with_a_part_that_does_not_fit_stays_as_it_was() -> None:
    model = build(True, False)
    model.structure_module = nn.Identity()
    before = dict(model.named_children())
    with pytest.raises(AttributeError):
        swap.apply(model, Mesh.create(1, 1, "cpu"))
    assert dict(model.named_children()) == before
