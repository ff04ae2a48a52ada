"""Identify the machine of a process, so that ranks can see whether they share it."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_SPACE = Path("/proc/self/ns/pid")  # processes of one such namespace see each other under /proc
_IDS = Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id")
_CARDS = Path("/sys/class/net")
_FIRST = Path("/proc/1/stat")
_UNKNOWN = secrets.token_hex(16)  # equal to that of no other process, but for its forks


def machine() -> tuple[str, int]:
    """Return an identifier that is equal for processes that see each other under /proc.

    Returns:
        (name of the machine since it was started, number of the space of its processes); where
        nothing names the machine, a name that no other process has.
    """
    boot = _text(_BOOT)
    try:
        space = os.stat(_SPACE).st_ino
    except OSError:
        space = 0
    if boot:
        return (boot, space) if space else (f"{boot}/{_age()}", space)
    return _made(), space


def _made() -> str:
    """A name for sandboxes and containers that show no boot_id.

    It is made of several things, for each can be alike on two machines: a machine-id that stands
    in an image, host names that are given, hardware addresses that follow from an address. The
    process that was started first has the same number everywhere, but seldom the same age.
    """
    named = next((text for text in map(_text, _IDS) if text), "")
    try:
        cards = sorted(filter(None, (_text(card / "address") for card in _CARDS.iterdir())))
    except OSError:
        cards = []
    cards = [address for address in cards if address.strip("0:")]
    if not named and not cards:
        return _UNKNOWN
    return "/".join([os.uname().nodename, named, *cards, _age()])


def _age() -> str:
    """Return the start time of the first process: the container's, where it has one of its own."""
    fields = _text(_FIRST).rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 else ""


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
