"""The result of the trunk on disk, so that a run that dies in sampling need not begin again.

One file per rank: a line that names the format, a line of JSON (names, shapes, dtypes, checksum),
then the tensors' bytes. Nothing in it is executed on reading.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foldcp.runtime.files.names import Unsafe, open_regular

_MAGIC = b"foldcp trunk 1\n"
_HEADER = 1 << 20  # bytes that the line of JSON has at most
_CHUNK = 64 << 20  # bytes that are copied to the host at once


class Damaged(Exception):
    """A file that is not what was written; says which and why."""


def key(parts: Mapping[str, object], tensors: Mapping[str, Tensor]) -> str:
    """Hash everything that a trunk's result follows from, to 16 hexadecimal digits.

    Args:
        parts: settings, versions, weights: anything with a `repr` of its value.
        tensors: features.
    """
    digest = hashlib.sha256(repr(sorted(parts.items())).encode())
    for name in sorted(tensors):
        x = tensors[name]
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(_bytes(x))
    return digest.hexdigest()[:16]


def save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors so that `path` is whole or absent.

    Args:
        path: of the file; its folder is made.
        tensors: by name, on any device.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    fields = [
        {"name": n, "dtype": str(x.dtype).removeprefix("torch."), "shape": list(x.shape)}
        for n, x in tensors.items()
    ]
    digest = hashlib.sha256()
    try:
        with partial.open("wb") as file:
            blank = json.dumps({"tensors": fields, "sha256": "0" * 64}).encode() + b"\n"
            file.write(_MAGIC + blank)
            for x in tensors.values():
                for chunk in _chunks(x):
                    digest.update(chunk)
                    file.write(chunk)
            file.seek(len(_MAGIC))
            header = json.dumps({"tensors": fields, "sha256": digest.hexdigest()}).encode() + b"\n"
            file.write(header)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path, device: torch.device) -> dict[str, Tensor] | None:
    """Read what `save` wrote.

    Args:
        path: of the file.
        device: of the tensors; bytes and random states stay on the CPU.

    Returns:
        The tensors by name; None when there is no file.

    Raises:
        Damaged: the file is cut short, changed, or of another format.
    """
    try:
        opened = open_regular(path)
    except FileNotFoundError:
        return None
    except Unsafe as error:
        raise Damaged(str(error)) from error
    with opened as file:
        if file.readline(len(_MAGIC)) != _MAGIC:
            raise Damaged(f"{path} is not a trunk file of this version of foldcp")
        try:
            header = json.loads(file.readline(_HEADER))
            digest, out = hashlib.sha256(), {}
            for field in header["tensors"]:
                out[field["name"]] = _read(file, field, digest, device)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, EOFError) as error:
            raise Damaged(f"{path} is damaged ({error})") from error
        if file.read(1) or digest.hexdigest() != header["sha256"]:
            raise Damaged(f"{path} is damaged (its checksum differs)")
    return out


def _read(file: Any, field: dict[str, Any], digest: Any, device: torch.device) -> Tensor:
    dtype = getattr(torch, field["dtype"])
    left = os.fstat(file.fileno()).st_size - file.tell()
    if not 0 <= prod(field["shape"]) * dtype.itemsize <= left:
        raise EOFError("it is cut short")
    x = torch.empty(field["shape"], dtype=dtype)
    view = _bytes(x)
    for lo in range(0, len(view), _CHUNK):
        part = view[lo : lo + _CHUNK]
        if file.readinto(part) != len(part):
            raise EOFError("it is cut short")
        digest.update(part)
    return x if dtype == torch.uint8 else x.to(device)


def _bytes(x: Tensor) -> memoryview:
    x = x.detach().cpu().contiguous()
    return x.view(-1).view(torch.uint8).numpy().data if x.numel() else memoryview(b"")


def _chunks(x: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, a part at a time: a tile may be larger than the host's memory."""
    flat = x.detach().contiguous().view(-1)
    step = max(1, _CHUNK // flat.element_size())
    for lo in range(0, flat.numel(), step):
        yield _bytes(flat[lo : lo + step])
