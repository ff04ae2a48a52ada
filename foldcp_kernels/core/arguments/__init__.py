"""Check the arguments of an op against its signature: once, before anything runs.

Of sizes that disagree the one that most arguments have is right, so that the error names the odd
one out. What fitted before is recognised by shapes and dtypes alone.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import isqrt, prod

import torch
from torch import Tensor

from foldcp_kernels.core.arguments.signatures import TABLE
from foldcp_kernels.core.dispatch import autocasts

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ALLOWED = {
    "float": FLOATS,
    "other": FLOATS,
    "mask": (*FLOATS, torch.bool),
    "wide": (torch.float32, torch.float64),
    "bool": (torch.bool,),
    "int32": (torch.int32,),
}
_KEPT = 32  # kinds of arguments of an op that are remembered: more than a model takes


@dataclass(frozen=True)
class _Argument:
    name: str
    optional: bool
    dims: tuple[str, ...]
    dtype: str
    partner: str | None


class Signature:
    """Say what the tensors of an op must be, and remember which kinds of them fitted.

    Args:
        op: its name in `signatures.TABLE`.
        text: its lines there.
    """

    def __init__(self, op: str, text: str) -> None:
        self.op = op.split()[0]
        self.arguments: tuple[_Argument, ...] = ()
        self.changed: tuple[tuple[str, int], ...] = ()  # in place when gradients are off
        self.fits: list[list[object]] = []
        self.fits_under_autocast: list[list[object]] = []
        for i, line in enumerate(filter(str.strip, text.splitlines())):
            line, _, partner = line.partition("&")
            name, *dims, dtype = line.split()
            plain = name.rstrip("?!")
            if "!" in name:
                self.changed = (*self.changed, (plain, i))
            found = _Argument(plain, "?" in name, tuple(dims), dtype, partner.strip() or None)
            self.arguments = (*self.arguments, found)

    def check(self, given: tuple[Tensor | None, ...], sizes: dict[str, int]) -> None:
        """Raise ValueError unless the tensors of a call fit each other.

        Args:
            given: the tensors in the order of the table.
            sizes: letters of the table that the call fixes.

        Raises:
            ValueError: names the argument, what was expected and what was got.
        """
        if not torch.is_grad_enabled():
            for name, i in self.changed:
                x = given[i]
                if x is not None and 0 in x.stride() and _shares(x):
                    raise ValueError(
                        f"{self.op}: `{name}` is expanded, so that several of its elements are "
                        "one, and would be changed in place: pass a copy (`.clone()`)"
                    )
        key: list[object] = [*sizes.values()]
        for x in given:
            if x is None:
                key.append(None)
            else:
                key.append(x.shape)
                key.append(x.dtype)
        if key in self.fits:
            return
        main = next(x for x in given if x is not None)
        if key in self.fits_under_autocast and autocasts(main):
            return
        fault = _shape_fault(self.arguments, given, sizes)
        fault = fault or _dtype_fault(self.arguments, given, autocasts(main))
        if fault:
            raise ValueError(f"{self.op}: {fault}")
        plain = _dtype_fault(self.arguments, given, False) is None
        known = self.fits if plain else self.fits_under_autocast
        known.insert(0, key)
        del known[_KEPT:]


SIGNATURES = {op: Signature(op, text) for op, text in TABLE.items()}


def check(op: str, *given: Tensor | None, **sizes: int) -> None:
    """Raise ValueError unless the tensors of a call fit each other.

    Args:
        op: its name in `signatures.TABLE`.
        given: its tensors in the order of the table.
        sizes: letters of the table that the call fixes.

    Raises:
        ValueError: names the argument, what was expected and what was got.
    """
    SIGNATURES[op].check(given, sizes)


def _shares(x: Tensor) -> bool:
    """True when elements of a tensor have the same place in memory."""
    return x.numel() > 0 and any(
        n > 1 and step == 0 for n, step in zip(x.shape, x.stride(), strict=True)
    )


def _shape_fault(
    arguments: tuple[_Argument, ...], given: tuple[Tensor | None, ...], sizes: dict[str, int]
) -> str | None:
    """The first argument that is missing or whose shape does not fit, None where all do."""
    named = {a.name: x for a, x in zip(arguments, given, strict=True)}
    for a, x in zip(arguments, given, strict=True):
        if x is None and not a.optional:
            return f"`{a.name}` is None; expected a tensor {_shown(a.dims)}"
        if a.partner and (x is None) != (named[a.partner] is None):
            missing, there = (a.name, a.partner) if x is None else (a.partner, a.name)
            return f"`{missing}` is None; expected a tensor because `{there}` is given"
    votes: dict[str, list[tuple[int, str]]] = {}
    for a, x in zip(arguments, given, strict=True):
        for part, n in _paired(a, x):
            letter, value = _solved(part, n, sizes)
            if value is not None:
                votes.setdefault(letter, []).append((value, a.name))
    right = {x: Counter(v for v, _ in cast).most_common(1)[0][0] for x, cast in votes.items()}
    for a, x in zip(arguments, given, strict=True):
        if x is None:
            continue
        wanted = [_size(part, right | sizes) for part in a.dims]
        pairs = [(part, n, _size(part, right | sizes)) for part, n in _paired(a, x)]
        odd = [part for part, n, want in pairs if n != want and not (n == 1 and part[:2] == "1|")]
        if not pairs and a.dims != ("...",) or odd:
            others = {x for x, cast in votes.items() if any(name != a.name for _, name in cast)}
            shown = [
                part
                if want is None or not _letters(part) <= others | sizes.keys()
                else part[: 2 * part.startswith("1|")] + str(want)
                for part, want in zip(a.dims, wanted, strict=True)
            ]
            message = f"`{a.name}` is {list(x.shape)}; expected {_shown(shown)}"
            return message + _witness(odd, votes, right, a.name, named)
    return None


def _witness(
    odd: list[str],
    votes: dict[str, list[tuple[int, str]]],
    right: dict[str, int],
    name: str,
    named: dict[str, Tensor | None],
) -> str:
    """Name another argument that has the size that was expected."""
    for part in odd:
        for letter in sorted(_letters(part)):
            for value, other in votes.get(letter, ()):
                if other != name and value == right[letter]:
                    return f" as `{other}` is {list(named[other].shape)}"
    return ""


def _paired(a: _Argument, x: Tensor | None) -> list[tuple[str, int]]:
    """(dimension of the table, size) of an argument; none where their numbers differ."""
    if x is None:
        return []
    dims = a.dims
    if dims[0] == "...":
        dims = dims[1:]
        return list(zip(dims, x.shape[-len(dims) :], strict=True)) if x.ndim >= len(dims) else []
    return list(zip(dims, x.shape, strict=True)) if x.ndim == len(dims) else []


def _letters(part: str) -> set[str]:
    return {x for x in part.removeprefix("1|").split("*") if x.isalpha()}


def _solved(part: str, n: int, sizes: dict[str, int]) -> tuple[str, int | None]:
    """(letter, its value) that a size of an argument says; None where it says none."""
    factors = part.removeprefix("1|").split("*")
    open_ = [x for x in factors if x.isalpha() and x not in sizes]
    if not open_ or (part != factors[0] and part[:2] == "1|" and n == 1):
        return "", None
    known = prod(sizes[x] if x in sizes else int(x) for x in factors if x not in open_)
    if known == 0 or n % known:
        return open_[0], None
    value = n // known
    if len(open_) == 2:  # a square
        value = isqrt(value)
        return open_[0], value if value * value * known == n else None
    return open_[0], value


def _size(part: str, known: dict[str, int]) -> int | None:
    """The size that a dimension must have, None where nothing says it."""
    factors = part.removeprefix("1|").split("*")
    if any(x not in known and not x.isdigit() for x in factors):
        return None
    return prod(known[x] if x in known else int(x) for x in factors)


def _shown(dims: tuple[str, ...] | list[object]) -> str:
    return f"[{', '.join(str(x).replace('1|', '1 or ') for x in dims)}]"


def _dtype_fault(
    arguments: tuple[_Argument, ...], given: tuple[Tensor | None, ...], autocast: bool
) -> str | None:
    """The first argument whose dtype does not fit, None where all do."""
    first, main = next((a.name, x) for a, x in zip(arguments, given, strict=True) if x is not None)
    for a, x in zip(arguments, given, strict=True):
        if x is None:
            continue
        allowed = _ALLOWED.get(a.dtype)
        why = ""
        if allowed is None:
            why = f" as `{first}` has"
            allowed = (main.dtype,)
            if main.dtype != torch.float64:
                if autocast:
                    allowed = FLOATS[:3]
                elif a.dtype == "gain":
                    allowed = (*allowed, torch.float32)
                else:
                    why += " (or autocast)"
        if x.dtype not in allowed:
            names = [str(d).removeprefix("torch.") for d in dict.fromkeys(allowed)]
            wanted = " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))
            return f"`{a.name}` has dtype {x.dtype}; expected {wanted}{why}"
    return None
