"""Ranks share memory only on one machine, also where no boot_id names it."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ranks import run

from foldcp.errors import TransportError
from foldcp.fabric import connect, machine
from foldcp.fabric.mesh import Mesh
from foldcp.runtime.liveness import peers

NOWHERE = Path("/proc/no/such/file")


def _hide(*names: str) -> None:
    for name in names:
        setattr(machine, name, NOWHERE if name != "_IDS" else ())


def joined(mesh: Mesh) -> dict[str, Any]:
    """Per case the transport that "auto" chose on this rank, or why "host" cannot run."""
    found, kept = {}, {n: getattr(machine, n) for n in ("_BOOT", "_SPACE", "_IDS", "_CARDS")}
    write, unknown = os.pwrite, machine._UNKNOWN

    def attempt(name: str) -> str:
        try:
            link = mesh.connected(name).link
        except TransportError as error:
            return str(error)
        told = link.name
        link.close()
        return told

    cases = {
        "no boot_id": lambda: _hide("_BOOT"),
        "no boot_id, no namespace": lambda: _hide("_BOOT", "_SPACE"),
        "on rank 1 only": lambda: _hide("_BOOT") if mesh.rank else None,
        "nothing": lambda: _hide("_BOOT", "_SPACE", "_IDS", "_CARDS"),
        # Two machines that look alike: what rank 0 made is not what rank 1 finds under its name.
        "alike": lambda: setattr(os, "pwrite", lambda *_: 0),
    }
    for case, rig in cases.items():
        rig()
        found[case] = attempt("auto"), attempt("host")
        for name, value in kept.items():
            setattr(machine, name, value)
        os.pwrite = write
    assert unknown == machine._UNKNOWN
    return found


def test_memory_is_shared_on_one_machine_only() -> None:
    first, second = run(1, 2, joined)
    assert first == second
    assert first["no boot_id"] == first["no boot_id, no namespace"] == ("host", "host")
    for case in ("on rank 1 only", "nothing"):
        carrier, refused = first[case]
        assert carrier == "gloo" and "the ranks are not on one machine" in refused, case
    carrier, refused = first["alike"]
    assert carrier == "gloo"
    assert "is not the segment of rank 0 of this run and this machine" in refused


def test_a_machine_is_named_alike_by_its_own_processes_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = {machine.machine()}
    assert machine.machine() in names

    def other(name: str, value: Any) -> None:
        monkeypatch.setattr(machine, name, value)
        seen = machine.machine()
        assert seen == machine.machine() and seen not in names, name
        names.add(seen)

    other("_BOOT", NOWHERE)
    image = tmp_path / "machine-id"  # as it stands in an image
    image.write_text("0123\n")
    other("_IDS", (image,))
    card = tmp_path / "cards" / "eth0"
    card.mkdir(parents=True)
    (card / "address").write_text("02:42:ac:11:00:02\n")
    other("_CARDS", tmp_path / "cards")
    first = tmp_path / "stat"
    first.write_text("1 (in it) S " + " ".join(map(str, range(30))))
    other("_FIRST", first)
    monkeypatch.setattr(machine.os, "uname", lambda: SimpleNamespace(nodename="elsewhere"))
    other("_SPACE", NOWHERE)
    other("_IDS", ())
    (card / "address").write_text("00:00:00:00:00:00\n")
    other("_UNKNOWN", "one")
    other("_UNKNOWN", "two")
    # What cannot be seen is not missed: its number may be that of another process here.
    gone = peers._Process("elsewhere", 2**22 + 1, "1")
    assert gone.state() == "running"
    assert connect.machine is machine.machine
