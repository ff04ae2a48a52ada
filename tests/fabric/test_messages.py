"""What ranks tell each other is data: a stranger on the machine or the network runs nothing."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import stranger
import torch
from boltz.data import types

from foldcp.boltz.lightning import data
from foldcp.config import Config
from foldcp.fabric import message, ranks
from foldcp.fabric.connect import Options


def test_a_stranger_reaches_no_unpickler(tmp_path: Path) -> None:
    found = stranger.run_cases(tmp_path)
    assert found.pop("would have"), "the payload would not have done anything"
    assert not found.pop("made"), "a payload was run"
    went_on = {"codes": [0, 0], "said": []}
    assert found.pop("pickle other") == went_on
    assert found.pop("no secret")["codes"] == [1, 1]
    (line,) = found["counter failed"]["said"]
    assert found.pop("counter failed")["codes"] == [1, 1]
    assert "could not say why, or a stranger writes to 127.0.0.1:" in line
    assert len(found) == 6
    for case, ended in found.items():
        if case in ("pickle beat", "unsealed peer") and ended == went_on:
            continue  # a rank wrote its own over the stranger's before another one looked
        assert ended["codes"] == [1, 1], (case, ended)
        # Where none of two ranks can read the other, each says so.
        assert 1 <= len(ended["said"]) <= 1 + (case == "other secret"), ended
        for line in ended["said"]:
            assert "was not written by a rank of this run" in line and "FOLDCP_SECRET" in line


def test_a_secret_is_long_and_never_shown() -> None:
    told = "0123456789abcdef"
    assert told not in repr(Config.from_env({"FOLDCP_SECRET": told}))
    with pytest.raises(ValueError, match="FOLDCP_SECRET must have at least 16 characters, got 15"):
        Config.from_env({"FOLDCP_SECRET": told[1:]})


def _values() -> dict[str, Any]:
    tensors: list[Any] = [
        torch.tensor([[1, 0], [2, 3]]).to(dtype) for dtype in message._TORCH.values()
    ]
    tensors += [torch.rand(3, 4).t(), torch.empty(0, 5), torch.tensor(2.5), torch.rand(400, 800)]
    arrays: list[Any] = [np.arange(6.0).reshape(2, 3)[:, ::2], np.array(["ab", "c"]), np.float32(3)]
    chain = types.ChainInfo(0, "A", 0, -1, "one_0", 7)
    record = types.Record("one", types.StructureInfo(num_chains=1), [chain], [])
    plain = [None, True, 1 << 90, -0.0, 1e-300, "é\udcff\n", b"\0\1", (1, (2,)), {"a": {(1, 2): 3}}]
    return {"plain": plain, "tensors": tensors, "arrays": arrays, "record": [record],
            "state": data.random_state(), "options": Options(3.0)}  # fmt: skip


def _same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (np.ndarray, np.generic)):
        return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return a == b


class _Line:
    """Stands for the connection between two ranks: what one sends, the other gets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[torch.Tensor] = []
        monkeypatch.setattr(ranks, "_transfer", self._transfer)
        self.sender, self.receiver = (SimpleNamespace(rank=r, sent_by=Counter()) for r in (0, 1))
        self.sending = True

    def _transfer(self, part: torch.Tensor, joined: Any, src: int) -> None:
        if joined is self.sender:
            self.sent.append(part.clone())
        elif part.numel():
            came = self.sent.pop(0) if self.sent else torch.zeros_like(part)
            part.zero_()[: came.numel()] = came[: part.numel()]

    def send(self, value: Any) -> None:
        ranks.broadcast(value, self.sender, 0)
        self.sent = [part for part in self.sent if part.numel()]

    def get(self) -> Any:
        return ranks.broadcast(None, self.receiver, 0)


def test_what_travels_comes_as_it_was_and_nothing_else_travels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(message, "_key", b"of this run")
    line, values = _Line(monkeypatch), _values()
    line.send(values)
    assert _same(line.get(), values)
    assert _same(message.unpack(message.pack(values, "here"), "here"), values)
    state = random.getstate()
    data.set_random_state(values["state"])
    random.setstate(state)
    for odd in (object(), {1, 2}, np.array([None]), lambda: 0, types.Record, Path("x")):
        with pytest.raises(TypeError, match="may not travel"):
            message.pack([odd], "here")
    payload = pickle.dumps(stranger.Payload(tmp_path / "made"))
    whole = message.pack(values, "here")
    hostile = [payload, b"", whole[:-1], whole + b"x", bytes(32) + whole[32:], whole[::-1]]
    for wrong in hostile:
        with pytest.raises(message.Forged, match="here.* seal is wrong"):
            message.unpack(wrong, "here")
    with pytest.raises(message.Forged):
        message.unpack(whole, "there")


def test_forged_transfers_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    line = _Line(monkeypatch)
    payload = pickle.dumps(stranger.Payload(tmp_path / "made"))
    as_tensor = torch.tensor(list(payload), dtype=torch.uint8)
    monkeypatch.setattr(message, "_key", b"of this run")
    # Each part of a real message replaced: head, description, small arrays, a large array.
    for i in range(4):
        line.send({"a": torch.arange(5), "b": torch.zeros(300_000)})
        assert len(line.sent) == 4
        line.sent[i] = as_tensor
        with pytest.raises(message.Forged):
            line.get()
        line.sent.clear()
    line.send("first")
    first = list(line.sent)
    line.get()
    line.send("second")
    line.sent[:] = first
    with pytest.raises(message.Forged):  # an old message in the place of a new one
        line.get()
    # Without a secret a stranger can seal what he likes: it is refused for what it holds.
    monkeypatch.setattr(message, "_key", b"")
    texts = [payload, b"[]", b"1e999999", b"[" * 10**5, b'["known", "Payload"]', b'["known"]',
             b'["array", "O8", [1]]', b'["tensor", "qint8", [1]]', b'["tensor", "int8", [-1]]',
             b'["known", "Options", ["deadline", 1]]', b'["dict", [["list"], 1]]', b'{"a": 1}',
             b'["array", "<f8", [1e30]]', b'["scalar", "<f8", [0]]']  # fmt: skip
    for text in texts:
        context = "object 1 of rank 0"
        seals = message.seal(context, text), message.seal(f"arrays of {context}")
        head = ranks._HEAD.pack(len(text), *seals)
        line.sent[:] = [torch.tensor(list(part), dtype=torch.uint8) for part in (head, text)]
        line.receiver.sent_by.clear()
        if text == b"1e999999":
            assert line.get() == float("inf")
            continue
        with pytest.raises(message.Forged):
            line.get()
    assert not (tmp_path / "made").exists()
