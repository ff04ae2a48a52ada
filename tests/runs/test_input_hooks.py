"""The road of one input: its order, what is set on the model, and how an input is dropped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import parity
import pytest
import torch
from alone import prediction
from torch import nn

import foldcp
from foldcp.boltz.families.dry_run.features import features
from foldcp.boltz.families.predict_step import PredictStep
from foldcp.boltz.families.swap import family_of
from foldcp.boltz.lightning import input_hooks
from foldcp.boltz.lightning.data import Failed
from foldcp.boltz.lightning.input_hooks import InputHooks
from foldcp.errors import InputLost
from foldcp.fabric.mesh import Mesh
from foldcp.modules.hooks import Folded, Hooks
from foldcp.modules.settings import Settings

N = 13


def swapped() -> nn.Module:
    model = parity.build_model(steering={"contact_guidance_update": False})
    foldcp.apply(model, Mesh.create(1, 1))
    parity.set_predict_args(model, recycling=0, steps=2, samples=2)
    return model


class Told(Hooks):
    """Note who is asked for what, in order."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.sizes: dict[tuple[str, int], int] = {}

    def attempt(self, work: Callable[[], Any]) -> Any:
        self.order.append("begin")
        found = work()
        self.order.append("end")
        return found

    def features(self, batch: Any) -> Any:
        self.order.append("features")
        return features(batch)

    def open_outputs(self, sizes: Any) -> None:
        self.order.append("outputs")
        self.sizes = sizes

    def keep_trunk(self, feats: Any, settings: Settings) -> Any:
        self.order.append("keep")
        return SimpleNamespace(load=lambda like: None, save=lambda *_: self.order.append("kept"))

    def at(self, stage: str, done: int, total: int) -> None:
        stage = stage.split()[0]
        if self.order[-1] != stage:
            self.order.append(stage)

    def hand_over(self, folded: Folded) -> Any:
        self.order.append("hand over")
        out = folded.outputs
        assert out.ratings is not None and out.ratings.pae is not None
        return {"pae": out.ratings.pae.shape, "coords": out.coords.shape}


def test_the_road_of_one_input() -> None:
    step, told = swapped().predict_step, Told()
    step.begin = lambda batch: told
    found = step(N)
    assert told.order == [
        "begin", "features", "outputs", "keep", "input", "recycle", "kept", "distogram",
        "conditioning", "diffusion", "confidence", "hand over", "end",
    ]  # fmt: skip
    assert told.sizes == {(name, m): N * N for name in ("pae", "pde") for m in range(2)}
    assert found["pae"] == (2, N, N) and found["coords"][0] == 2
    step.write_embeddings = True
    step(N)
    assert told.sizes["z", 0] == N * N * step.fold.model.z_norm.weight.shape[0]


def test_nothing_is_set_on_the_model_but_its_step() -> None:
    model = parity.build_model(steering={"contact_guidance_update": False})
    before = {*dir(model)}
    foldcp.apply(model, Mesh.create(1, 1))
    assert {*dir(model)} == before and not [name for name in before if "foldcp" in name]
    assert vars(model).keys() - vars(parity.build_model()).keys() == {"predict_step"}
    with pytest.raises(ValueError, match="swapped before"):
        foldcp.apply(model, Mesh.create(1, 1))


def test_subclasses_and_compiled_models_belong_to_the_family() -> None:
    model = parity.build_model(steering={"contact_guidance_update": False})

    class Mine(type(model)):
        pass

    model.__class__ = Mine
    assert family_of(model).name == "Boltz-2"
    compiled = torch.compile(model)
    foldcp.apply(compiled, Mesh.create(1, 1))
    assert isinstance(model.predict_step, PredictStep)
    assert compiled.predict_step is model.predict_step
    with pytest.raises(ValueError, match="must be a Boltz2 or Boltz1, got Linear"):
        foldcp.apply(nn.Linear(1, 1), Mesh.create(1, 1))


@pytest.mark.parametrize("when", ["featurised", "opened", "folded"])
def test_a_lost_input_is_dropped_with_its_reason(when: str, tmp_path: Path) -> None:
    dropped: list[str] = []
    lost = mock.Mock(side_effect=InputLost("no room"))
    writer = SimpleNamespace(
        open_outputs=lost if when == "opened" else lambda *_: None,
        discard=dropped.append,
        hand_over=mock.Mock(),
    )
    data = SimpleNamespace(moved=lambda feats, device: feats)
    batch: Any = features(N) | {"record": [SimpleNamespace(id="one")]}
    if when == "featurised":
        batch = Failed("one", "no room")
    step = swapped().predict_step
    if when == "folded":
        step.fold.trunk = lost
    asked = mock.Mock(side_effect=input_hooks.together)
    with prediction() as run, mock.patch.object(input_hooks, "together", asked):
        step.begin = lambda batch: InputHooks(run, step, data, writer, batch)
        assert step(batch) == {"exception": True}
    assert run.failed == {"one": "no room"} and dropped == ["one"]
    assert asked.call_count == 1 and not writer.hand_over.called
