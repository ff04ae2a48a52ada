"""Messages between ranks: plain data and arrays, sealed with the secret of the run.

A message is JSON that describes a value, and the bytes of its arrays. Reading one makes numbers,
text, containers, arrays, tensors and the dataclasses registered with `known`; nothing in it is
run, so whoever reaches a port of this run can at most end it. Ranks that have the same secret
(FOLDCP_SECRET) also notice a message that none of them wrote.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from foldcp.errors import UserError

Kind = TypeVar("Kind", bound=type)

SEAL = hashlib.sha256().digest_size  # bytes of a seal
_PLAIN = (type(None), bool, int, float, str)
_NUMPY = re.compile(r"[<>|=]?[biufcSU]\d{1,6}")
_TORCH = {
    str(kind).removeprefix("torch."): kind
    for kind in (
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
    )
}  # fmt: skip

# Two things are of the process, not of a mesh or store. `known` says what may travel, where a
# dataclass is defined, and that does not change afterwards. The secret is that of the process's
# environment, alike for everything that it sends and receives in its life.
_known: dict[str, type] = {}
_key = b""


class Forged(UserError):
    """A message that no rank of this run wrote."""

    def __init__(self, context: str, why: str) -> None:
        super().__init__(
            f"a message that reached this rank ({context}) was not written by a rank of this run "
            f"({why}): another program reaches its ports, or the ranks have different secrets: "
            "give all ranks the same FOLDCP_SECRET"
        )


def known(kind: Kind) -> Kind:
    """Let a dataclass travel; its fields must be what may travel."""
    _known[kind.__name__] = kind
    return kind


def use_secret(secret: str) -> None:
    """Seal messages with a secret from now on.

    Args:
        secret: alike on all ranks; "" seals against nothing but damage.
    """
    global _key
    _key = hashlib.sha256(b"foldcp messages" + secret.encode()).digest() if secret else b""


def encode(value: Any) -> tuple[bytes, list[memoryview]]:
    """Describe a value.

    Args:
        value: None, numbers, text, bytes, lists, tuples, dicts, arrays without objects, tensors,
            and dataclasses that are `known`.

    Returns:
        JSON, and the bytes of each array in it.

    Raises:
        TypeError: something in it may not travel.
    """
    arrays: list[memoryview] = []
    return json.dumps(_describe(value, arrays)).encode(), arrays


def _describe(value: Any, arrays: list[memoryview]) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind in (list, tuple):
        return [kind.__name__, *(_describe(x, arrays) for x in value)]
    if kind is dict:
        pairs = value.items()
        return ["dict", *([_describe(k, arrays), _describe(v, arrays)] for k, v in pairs)]
    if kind in (bytes, bytearray):
        arrays.append(memoryview(value).cast("B"))
        return ["bytes", len(value)]
    if isinstance(value, Tensor):
        arrays.append(_bytes(value))
        return ["tensor", str(value.dtype).removeprefix("torch."), list(value.shape)]
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.ascontiguousarray(value).reshape(np.shape(value))
        if not _NUMPY.fullmatch(array.dtype.str):
            raise TypeError(f"an array of {array.dtype} may not travel between ranks")
        arrays.append(array.reshape(-1).view(np.uint8).data)
        scalar = isinstance(value, np.generic)
        return ["scalar" if scalar else "array", array.dtype.str, list(array.shape)]
    if _known.get(kind.__name__) is kind:
        fields = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
        return ["known", kind.__name__, *([n, _describe(x, arrays)] for n, x in fields)]
    raise TypeError(f"a {kind.__module__}.{kind.__qualname__} may not travel between ranks")


def _bytes(x: Tensor) -> memoryview:
    x = x.detach().cpu().contiguous()
    return x.view(-1).view(torch.uint8).numpy().data if x.numel() else memoryview(b"")


def sizes(text: bytes) -> list[int]:
    """Return the bytes of each array of an encoded value."""
    found: list[int] = []
    _build(json.loads(text), None, found)
    return found


def decode(text: bytes, arrays: Sequence[Tensor]) -> Any:
    """Make the value that `encode` described.

    Args:
        text: the JSON.
        arrays: [bytes] uint8, the bytes of each array; the result keeps them.

    Raises:
        ValueError: `text` describes nothing that may travel.
    """
    return _build(json.loads(text), iter(arrays), [])


def _build(told: Any, arrays: Any, found: list[int]) -> Any:
    """Make a value; with `arrays` None only count the bytes of its arrays."""
    if type(told) in _PLAIN:
        return told
    if type(told) is not list or not told:
        raise ValueError("it is not laid out as a message")
    tag, *rest = told
    if tag in ("list", "tuple"):
        items = [_build(x, arrays, found) for x in rest]
        return items if tag == "list" else tuple(items)
    if tag == "dict":
        pairs = [(_build(k, arrays, found), _build(v, arrays, found)) for k, v in rest]
        return dict(pairs) if arrays is not None else None
    if tag == "known":
        kind, fields = _known[rest[0]], {n: _build(x, arrays, found) for n, x in rest[1:]}
        if fields.keys() != {f.name for f in dataclasses.fields(kind)}:
            raise ValueError(f"a {rest[0]} has other fields")
        return kind(**fields) if arrays is not None else None
    if tag not in ("bytes", "tensor", "array", "scalar"):
        raise ValueError("it holds what may not travel")
    of: Any  # dtype
    of, shape = (np.uint8, rest) if tag == "bytes" else (rest[0], rest[1])
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("a shape is not made of whole numbers")
    if tag == "tensor":
        of = _TORCH[of]
    elif tag != "bytes" and not _NUMPY.fullmatch(of):
        raise ValueError(f"an array of {of} may not travel")
    count = int(np.prod(shape, dtype=object)) if shape else 1
    size = count * (of.itemsize if tag == "tensor" else np.dtype(of).itemsize)
    found.append(size)
    if arrays is None:
        return None
    data = next(arrays)
    if data.numel() != size:
        raise ValueError("an array has another size")
    return _array(tag, data, of, shape)


def _array(tag: str, data: Tensor, kind: Any, shape: list[int]) -> Any:
    if tag == "bytes":
        return data.numpy().tobytes()
    if tag == "tensor":
        return (data.view(kind) if data.numel() else torch.empty(0, dtype=kind)).view(shape)
    array = data.numpy().view(kind) if data.numel() else np.empty(0, dtype=kind)
    return array[0] if tag == "scalar" else array.reshape(shape)


def pack(value: Any, context: str) -> bytes:
    """Pack a small value as one sealed message.

    Args:
        value: see `encode`.
        context: what the message is for; it is only good for that.
    """
    text, arrays = encode(value)
    return close(context, b"".join([struct.pack("<Q", len(text)), text, *arrays]))


def unpack(sealed: bytes, context: str) -> Any:
    """Unpack the value of a sealed message, after checking its seal.

    Args:
        sealed: from `pack`.
        context: what the message is for.

    Raises:
        Forged: no rank of this run wrote it.
    """
    data = open_sealed(context, sealed)
    with reading(context):
        (length,) = struct.unpack_from("<Q", data)
        text, rest = data[8 : 8 + length], memoryview(data)[8 + length :]
        arrays, lo = [], 0
        for size in sizes(text):
            arrays.append(torch.from_numpy(np.array(rest[lo : lo + size], np.uint8)))
            lo += size
        return decode(text, arrays)


@contextmanager
def reading(context: str) -> Iterator[None]:
    """Turn whatever is wrong in a message into `Forged`."""
    try:
        yield
    except Exception as error:
        raise Forged(context, f"it cannot be read: {error}") from None


def close(context: str, data: bytes) -> bytes:
    """Put a seal before some bytes.

    Args:
        context: what the message is for.
        data: the message.
    """
    return seal(context, data) + data


def open_sealed(context: str, sealed: bytes) -> bytes:
    """Check the seal of a message and return its bytes.

    Args:
        context: what the message is for.
        sealed: from `close`.

    Raises:
        Forged: the seal is not of this run, or of another message.
    """
    check(context, sealed[:SEAL], sealed[SEAL:])
    return bytes(sealed[SEAL:])


def seal(context: str, *data: Any) -> bytes:
    """Compute the seal of a message of several parts.

    Args:
        context: what the message is for.
        data: its parts.
    """
    told = json.dumps([context, *(len(part) for part in data)]).encode()
    code = hmac.new(_key, struct.pack("<Q", len(told)) + told, hashlib.sha256)
    for part in data:
        code.update(part)
    return code.digest()


def check(context: str, found: bytes, *data: Any) -> None:
    """Compare a seal with its message.

    Args:
        context: what the message is for.
        found: the seal that came with it.
        data: its parts.

    Raises:
        Forged: they do not belong together.
    """
    if not hmac.compare_digest(bytes(found), seal(context, *data)):
        raise Forged(context, "its seal is wrong")
