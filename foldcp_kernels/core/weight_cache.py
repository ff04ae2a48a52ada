"""Keep what is made of weights, stacked or in another dtype, as long as the weights live."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


class WeightCache:
    """Results of functions of weights; those of a tensor are freed with it.

    It serves the weights of a process, whichever module they are of: weights come as tensors, and
    tensors have no room for what is made of them.
    """

    def __init__(self) -> None:
        self._held: Any = WeakIdKeyDictionary()  # first of the weights -> what is made of them
        self._made_elsewhere: Callable[..., Any] | None = None

    @contextmanager
    def deriving(self, make: Callable[..., Any] | None) -> Iterator[None]:
        """Inside, make `derived` return what `make(name, tensors, build, key)` does."""
        before, self._made_elsewhere = self._made_elsewhere, make
        try:
            yield
        finally:
            self._made_elsewhere = before

    def derived(
        self, name: str, tensors: Sequence[Tensor], build: Callable[..., Any], *key: Any
    ) -> Any:
        """Return `build(*tensors)`, kept while the tensors live and stay as they are.

        Args:
            name: what is built.
            tensors: parameters.
            build: called with them, without gradient.
            key: what else the result depends on (the dtype, for example).
        """
        if self._made_elsewhere is not None:
            return self._made_elsewhere(name, tuple(tensors), build, key)
        first = tensors[0]
        versions = tuple((id(x), 0 if x.is_inference() else x._version) for x in tensors)
        held = self._held.get(first)
        if held is None:
            held = self._held[first] = {}
        found = held.get((name, *key))
        if found is None or found[0] != versions:
            device = "cuda" if first.device.type == "meta" else first.device.type
            with torch.no_grad(), torch.autocast(device, enabled=False):
                found = (versions, build(*tensors))
            if found[1] is first:  # an entry that holds its own key would never be freed
                return first
            held[(name, *key)] = found
        return found[1]

    def cast(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a weight as kernels read it, contiguous and in `dtype`; made once while it lives.

        Args:
            weight: of any shape.
            dtype: of the result.
        """
        if weight.dtype == dtype and weight.is_contiguous():
            return weight
        return self.derived("cast", (weight,), lambda w: w.to(dtype).contiguous(), dtype)


_OF_THE_PROCESS = WeightCache()
derived, deriving = _OF_THE_PROCESS.derived, _OF_THE_PROCESS.deriving
cast = _OF_THE_PROCESS.cast
