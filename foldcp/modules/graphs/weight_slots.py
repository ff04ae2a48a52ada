"""Tensors that stand in for the weights of a module, so that others' weights can be put there."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from foldcp.fabric.mesh import Mesh
from foldcp_kernels.core import weight_cache

_OF_EVERY_MODULE = vars(nn.Module()).keys() - {"training"}
_PLAIN = (bool, int, float, str, tuple, type(None))


def signature(module: nn.Module) -> Any:
    """Return what two modules must share to differ in weights alone; None for one with hooks.

    Args:
        module: its submodules, their settings, and shapes of their parameters and buffers count;
            an attribute that cannot be compared must be the same object.
    """
    found: list[Any] = []
    for name, part in module.named_modules():
        if part._forward_hooks or part._forward_pre_hooks:
            return None
        own = {k: v for k, v in vars(part).items() if k not in _OF_EVERY_MODULE}
        settings = sorted((k, _setting(v)) for k, v in own.items())
        tensors = [
            (k, None if x is None else (x.shape, x.dtype, x.stride()))
            for held in (part._parameters, part._buffers)
            for k, x in held.items()
        ]
        found.append((name, type(part), tuple(settings), tuple(tensors)))
    return tuple(found)


def _setting(value: Any) -> Any:
    """An attribute as something that is equal for equal ones."""
    if isinstance(value, _PLAIN):
        return value
    if not isinstance(value, Mesh):
        with suppress(Exception):  # what cannot be pickled must be the same object
            return pickle.dumps(value)
    return id(value)


class WeightSlots:
    """Slots for the weights of modules with one signature, and for what ops derive from them.

    Args:
        module: gives the shapes; while the slots stand in, it reads them.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._own = {name: torch.empty_like(x) for name, x in _named(module).items()}
        self._names = {id(x): name for name, x in self._own.items()}
        # (what is derived, the weights' names, its key) -> (how it is made, its slot; None where it
        # is the first of the weights itself)
        self._made: dict[Any, tuple[Callable[..., Any], Tensor | None]] = {}
        self._loaded: nn.Module = module
        # id of a module -> (slots and state of its weights when it was looked up, what fills them)
        self._sources: dict[int, tuple[Any, list[Tensor]]] = {}
        self._complete = False

    def load(self, module: nn.Module) -> None:
        """Put the weights of a module into the slots."""
        self._loaded = module
        made = [(at, *found) for at, found in self._made.items() if found[1] is not None]
        known, sources = self._sources.get(id(module), (None, []))
        # A weight that was changed in place: what is derived of it is another tensor.
        if not sources or known != (len(made), _versions(sources[: len(self._own)])):
            named = _named(module)
            own = [named[name] for name in self._own]
            sources = own + [self._derive(at, build, named) for at, build, _ in made]
            self._sources[id(module)] = (len(made), _versions(own)), sources
        torch._foreach_copy_([*self._own.values(), *(slot for _, _, slot in made)], sources)

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Have the module read the slots, and what it derives from weights come from slots."""
        names = {id(x): name for name, x in _named(self._module).items()}
        places = [
            (held, key, x)
            for part in self._module.modules()
            for held in (part._parameters, part._buffers)
            for key, x in held.items()
            if x is not None
        ]
        for held, key, x in places:
            held[key] = self._own[names[id(x)]]
        try:
            with weight_cache.deriving(self._slot):
                yield
        finally:
            for held, key, x in places:
                held[key] = x

    @contextmanager
    def complete(self) -> Iterator[None]:
        """Refuse new slots inside: their filling would be recorded, for one module only."""
        self._complete = True
        try:
            yield
        finally:
            self._complete = False

    def _slot(self, name: str, weights: tuple[Tensor, ...], build: Any, key: tuple) -> Any:
        """The slot of what `weight_cache.derived` makes of the slots of weights."""
        names = tuple(self._names.get(id(x), "") for x in weights)
        if "" in names:
            raise RuntimeError(f"{name} is derived from a tensor that is no weight of the block")
        at = (name, names, key)
        if at not in self._made:
            if self._complete:
                raise RuntimeError(f"{name} was not derived before the recording")
            named = _named(self._loaded)
            source = self._derive(at, build, named)
            itself = source is named[names[0]]
            self._made[at] = build, None if itself else source.clone()
        slot = self._made[at][1]
        return weights[0] if slot is None else slot

    def _derive(self, at: Any, build: Callable[..., Any], named: dict[str, Tensor]) -> Tensor:
        """Derive the values kept for the weights `named` of a module."""
        name, names, key = at
        with weight_cache.deriving(None):
            return weight_cache.derived(name, [named[n] for n in names], build, *key)


def _named(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _versions(weights: list[Tensor]) -> int:
    """A number that grows when one of them is changed in place."""
    return sum(0 if x.is_inference() else x._version for x in weights)
