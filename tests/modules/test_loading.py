"""Checkpoints are loaded without drawing, and leave what follows the draws of stock."""

from __future__ import annotations

import importlib
import random
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from bench.synthetic import FILE_NAMES
from foldcp.boltz.families import loading
from foldcp.boltz.families.mersenne import skip
from foldcp.boltz.lightning.data import random_state, set_random_state


@pytest.mark.parametrize("drawn", [0, 1, 623, 624, 1000])
def test_skipping_equals_drawing(drawn: int) -> None:
    twister = np.random.MT19937()
    for count in (0, 1, 2, 623, 624, 625, 19937, 3_000_001):
        twister._legacy_seeding(7)
        twister.random_raw(drawn, output=False)
        before = twister.state["state"]
        key, position = skip(before["key"].copy(), before["pos"], count)
        twister.random_raw(count, output=False)
        after = twister.state["state"]
        assert position == after["pos"]
        assert (key == after["key"]).all()


def _model(kind: str) -> type[nn.Module]:
    name = "Boltz1" if kind == "boltz1" else "Boltz2"
    return getattr(importlib.import_module(f"boltz.model.models.{name.lower()}"), name)


def _loaded(load: Any, path: Path) -> tuple[nn.Module, tuple[Any, ...]]:
    torch.manual_seed(3)
    np.random.seed(4)
    random.seed(5)
    torch.rand(5)
    model = load(path, strict=True, map_location="cpu")
    return model, random_state()


def _assert_same(
    got: tuple[nn.Module, tuple[Any, ...]], stock: tuple[nn.Module, tuple[Any, ...]]
) -> None:
    (model, (cpu, _, of_numpy, of_python)), (expected, state) = got, stock
    assert torch.equal(cpu, state[0])
    assert (of_numpy[1] == state[2][1]).all()
    assert of_numpy[2:] == state[2][2:]
    assert of_python == state[3]
    for found, wanted in (
        (model.state_dict(), expected.state_dict()),
        (dict(model.named_buffers()), dict(expected.named_buffers())),
    ):
        assert found.keys() == wanted.keys()
        assert all(x.dtype == wanted[k].dtype for k, x in found.items())
        assert all(torch.equal(x, wanted[k]) for k, x in found.items())
    pairs = zip(model.parameters(), expected.parameters(), strict=True)
    assert all(a.requires_grad == b.requires_grad for a, b in pairs)


@pytest.mark.parametrize("kind", list(FILE_NAMES))
def test_a_loaded_model_and_what_is_drawn_next_are_those_of_stock(
    kind: str, tiny_cache: Path, tmp_path: Path
) -> None:
    model, path = _model(kind), tiny_cache / FILE_NAMES[kind]
    stock = _loaded(model.load_from_checkpoint, path)
    draws = mock.Mock(wraps=loading._Draws.take, side_effect=loading._Draws.take)
    with mock.patch.object(loading._Draws, "take", lambda self: draws(self)):
        _assert_same(_loaded(lambda p, **o: loading.load(model, p, **o), path), stock)
    assert draws.called  # it was the short way

    # A file of the old format cannot be mapped; weights of another dtype become the model's.
    found = torch.load(path, weights_only=False)
    found["state_dict"] = {k: x.double() for k, x in found["state_dict"].items()}
    torch.save(found, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    _assert_same(_loaded(lambda p, **o: loading.load(model, p, **o), tmp_path / "old.ckpt"), stock)


def test_an_initialisation_that_draws_otherwise_is_left_to_draw(tiny_cache: Path) -> None:
    model, path = _model("boltz2"), tiny_cache / FILE_NAMES["boltz2"]
    plain = nn.LayerNorm.reset_parameters

    def drawing(self: nn.LayerNorm) -> None:
        plain(self)
        np.random.rand(3)

    with mock.patch.object(nn.LayerNorm, "reset_parameters", drawing):
        stock = _loaded(model.load_from_checkpoint, path)
        _assert_same(_loaded(lambda p, **o: loading.load(model, p, **o), path), stock)


def test_weights_are_pages_of_the_file_until_they_are_written(tiny_cache: Path) -> None:
    path = tiny_cache / FILE_NAMES["boltz2"]
    state = random_state()
    model = loading.load(_model("boltz2"), path, strict=True, map_location="cpu")
    set_random_state(state)
    before = path.read_bytes()
    assert str(path.resolve()) in Path("/proc/self/maps").read_text()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    assert path.read_bytes() == before
